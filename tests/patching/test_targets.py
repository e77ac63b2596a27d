"""Targets: what a name stands for, and what is said about one that is not there."""

import pytest

from mindspeed.errors import TargetError
from mindspeed.patching import replace, wrap
from mindspeed.patching.plan import Plan
from mindspeed.patching.resolve import resolve
from tests.patching.conftest import TOY, halve, owned, plus_one


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("double", "function"),
        ("Base", "class"),
        ("Base.forward", "function"),
        ("Base.static", "staticmethod"),
        ("Base.make", "classmethod"),
        ("Base.size", "property"),
        ("Base.cached", "property"),
        ("Base.Inner.ping", "function"),
        ("Single.__new__", "staticmethod"),
        ("flag_variable", "data"),
        ("Config.hidden", "data"),
        ("double.__kwdefaults__", "data"),
    ],
)
def test_both_forms_of_a_target_find_the_stored_object(toy, name, kind):
    colon, dotted = resolve(f"{TOY}:{name}"), resolve(f"{TOY}.{name}")
    assert colon.kind == dotted.kind == kind
    assert colon.value is dotted.value
    assert colon.target == dotted.target == f"{TOY}:{name}"


def test_inherited_members_are_known_as_such(toy):
    assert resolve(f"{TOY}:Child.forward").inherited and not resolve(f"{TOY}:Base.forward").inherited


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_package.x:f", "there is no module no_such_package.x"),
        ("no_such_package.x.f", "there is no module no_such_package"),
        (f"{TOY}:Base.nothing", "has no attribute 'nothing'"),
        (f"{TOY}:Nothing.at", "has no Nothing.at"),
        (f"{TOY}.absent", "has no attribute 'absent'"),
        (f"{TOY}:", "is not of the form"),
    ],
)
def test_absent_targets_are_named(target, words):
    with pytest.raises(TargetError, match="^[^\n]*" + words.replace(".", r"\.")):
        resolve(target)


def test_a_module_that_fails_to_import_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "broken_toy.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match="importing broken_toy failed, because it needs 'a_package_nobody_has'"):
        resolve("broken_toy:f")


def test_all_missing_targets_stand_in_one_message(toy):
    patches = [
        owned(wrap(f"{TOY}:gone", plus_one), "first", "--first"),
        owned(replace(f"{TOY}:Base.lost", halve), "second", "--second 3"),
    ]
    with pytest.raises(TargetError) as caught:
        Plan.of(patches, host_versions={"megatron-core": "0.13.0 at /somewhere"})
    text = str(caught.value)
    for words in ("feature 'first' (--first)", f"{TOY}:gone", "'second' (--second 3)", "0.13.0 at /somewhere", "0.12.1"):
        assert words in text
