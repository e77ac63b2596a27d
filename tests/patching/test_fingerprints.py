import re
import sys
import textwrap

import pytest

from mindspeed.errors import TargetError
from mindspeed.patching import fingerprints as prints
from mindspeed.patching import wrap
from mindspeed.patching.plan import Plan
from mindspeed.patching.resolve import resolve
from tests.patching.conftest import owned

SOURCE = '''
def area(width: int, height=2):
    """Of a rectangle."""
    return width * height


class Box:
    """A box."""

    def volume(self, depth, *, scale=1):
        text = f"""multi
        line {depth}"""
        return depth * scale, text
'''


@pytest.fixture
def edited_host(tmp_path, monkeypatch):
    """Import a module with the given source while the table holds the fingerprints of SOURCE."""
    recorded = {"a_small_host": {name: str(value) for name, value in prints.of_source(SOURCE).items()}}
    monkeypatch.setattr(prints, "recorded", lambda: recorded)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(prints.STRICT, raising=False)

    def load(source):
        (tmp_path / "a_small_host.py").write_text(source)
        sys.modules.pop("a_small_host", None)
        return [owned(wrap(f"a_small_host:{name}", print), "toy-feature", "--toy") for name in ("area", "Box.volume")]

    yield load
    sys.modules.pop("a_small_host", None)


@pytest.mark.parametrize(
    "change",
    [
        ("Of a rectangle.", "Of something else."),
        ("width: int", "width: float"),
        ("    return width", "    # why\n\n    return  width"),
        ("height=2)", "height=2) -> int"),
    ],
)
def test_docstrings_annotations_and_layout_do_not_count(edited_host, change, caplog):
    assert change[0] in SOURCE
    Plan.of(edited_host(SOURCE.replace(*change)))
    assert caplog.text == ""


def test_changed_body_warns_once_and_stops_when_strict(edited_host, caplog, monkeypatch):
    patches = edited_host(SOURCE.replace("width * height", "width + height").replace("depth * scale", "scale"))
    Plan.of(patches)
    assert len(caplog.records) == 1
    assert "a_small_host:area, a_small_host:Box.volume" in caplog.text and prints.STRICT in caplog.text
    monkeypatch.setenv(prints.STRICT, "1")
    with pytest.raises(TargetError, match=r"feature 'toy-feature' \(--toy\): a_small_host:area has another body"):
        Plan.of(patches)


@pytest.mark.parametrize(
    "change", [("depth, *, scale=1", "depth, scale=1"), ("scale=1", "scale=2"), ("depth, *", "depth, more, *")]
)
def test_changed_signature_stops_and_is_shown(edited_host, change):
    with pytest.raises(TargetError) as caught:
        Plan.of(edited_host(SOURCE.replace(*change)))
    assert "a_small_host:Box.volume has another signature: Box.volume(self, depth" in str(caught.value)
    assert "Supported: 0.12.1" in str(caught.value)


def test_patched_functions_are_compared_by_their_originals(edited_host, caplog):
    patches = edited_host(SOURCE)
    with Plan.of(patches).applied():
        assert prints.drift_of(resolve("a_small_host:area")) is None
        Plan.of([owned(patch, "other.layer") for patch in patches])
    assert caplog.text == ""


def test_memory_and_file_agree(edited_host):
    edited_host(SOURCE)
    import a_small_host

    table = prints.of_source(SOURCE)
    assert (
        prints.of_object(a_small_host.Box.volume) == table["Box.volume"] and prints.of_object(a_small_host.Box) == table["Box"]
    )
    exec(compile("def made(): pass", "<nowhere>", "exec"), vars(a_small_host))
    assert prints.of_object(a_small_host.made) is None  # no source, no verdict


def test_alternative_definitions_are_found():
    source = textwrap.dedent("""
        try:
            import x
            def f(a): pass
        except ImportError:
            def f(b): pass
        if x:
            class C:
                def m(self): pass
    """)
    assert set(prints.of_source(source)) == {"f", "C", "C.m"}


def test_table_fits_the_installed_host():
    present, recorded = prints.record()["modules"], prints.recorded()
    assert sorted(present) == sorted(recorded), f"run: {prints._RECORD}"
    assert sum(name.startswith("megatron.core") for name in recorded) > 100
    for name in present:  # a difference here means that the installed host is not the supported one
        assert present[name] == recorded[name], name


def test_every_module_that_our_targets_name_is_in_the_table():
    recorded = prints.recorded()
    packages = {name.rpartition(".")[0] for name in recorded}
    unknown = set()
    for path in prints.TABLE.parent.parent.rglob("*.py"):
        for target in re.findall(r"[\"'](megatron(?:\.[a-z_0-9]+)+):[A-Za-z_]", path.read_text(encoding="utf-8")):
            if target not in recorded and target not in packages:
                unknown.add(target)
    assert unknown <= {"megatron.training"}, f"not in the table: {sorted(unknown)}"
