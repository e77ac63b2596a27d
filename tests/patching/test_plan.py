import functools
import inspect
import multiprocessing
import pickle
import subprocess
import sys
import threading
import types

import pytest

from mindspeed.errors import ConflictError, LedgerError, TargetError
from mindspeed.patching import add, replace, rewrite, set_value, wrap
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.plan import Plan
from mindspeed.patching.resolve import resolve
from tests.patching.conftest import TOY, owned


def plus_one(original, *args, **kwargs):
    return original(*args, **kwargs) + 1


def times_ten(original, *args, **kwargs):
    return original(*args, **kwargs) * 10


def halve(x, *, by=2):
    return x / by


def apply(ledger, *patches):
    Plan.of([patch if patch.owner else owned(patch) for patch in patches]).apply(ledger)


# --- targets ----------------------------------------------------------------------------------------------


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


# --- operations -------------------------------------------------------------------------------------------


def test_wraps_reach_every_kind_of_member(toy, ledger):
    seen = []

    def note(original, *args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    names = [
        "double",
        "Base.__init__",
        "Base.forward",
        "Base.static",
        "Base.make",
        "Base.size",
        "Base.cached",
        "Config.__post_init__",
    ]
    apply(ledger, *(wrap(f"{TOY}:{name}", note) for name in names))
    base = toy.Base.make(3)
    assert (toy.double(2), base.forward(1), base.static(3), base.size, base.cached) == (4, 4, 2, 30, 300)
    assert toy.Base.static(5) == 4 and toy.Config().checked
    assert isinstance(vars(toy.Base)["static"], staticmethod) and isinstance(vars(toy.Base)["make"], classmethod)
    assert (3,) in seen  # make: the original is bound to the class already
    assert {name: ledger.calls(f"{TOY}:{name}") for name in names} == dict.fromkeys(names, 1) | {"Base.static": 2}
    assert vars(toy.Base)["size"].__doc__ == "The size."


def test_classmethod_and_new_are_called_with_the_right_class(toy, ledger):
    apply(ledger, wrap(f"{TOY}:Base.make", lambda original, value: original(value + 1)))
    assert type(toy.Child.make(1)) is toy.Child and toy.Child.make(1).value == 2
    made = []
    apply(ledger, wrap(f"{TOY}:Single.__new__", lambda original, cls: made.append(cls) or original(cls)))
    single = toy.Single()
    assert toy.Single() is single and made == [toy.Single, toy.Single]
    toy.Single.made = None


def test_new_that_does_not_exist_cannot_be_wrapped(toy):
    # CPython keeps calling a slot for a __new__ that was deleted again, and object.__new__ then takes no arguments
    with pytest.raises(TargetError, match="inherits object's.; use __init__"):
        Plan.of([owned(wrap(f"{TOY}:Base.__new__", plus_one))])


def test_inherited_method_is_wrapped_on_the_subclass_only(toy, ledger):
    apply(ledger, wrap(f"{TOY}:Child.only_in_base", lambda original, *args: ("child", *original(*args))))
    assert toy.Child().only_in_base(1) == ("child", "base", 1, "Child")
    assert toy.Base().only_in_base(1) == ("base", 1, "Base")
    # the base class is asked at the time of the call
    apply(ledger, owned(wrap(f"{TOY}:Base.only_in_base", lambda original, *args: ("patched", *original(*args))), "b"))
    assert toy.Child().only_in_base(1) == ("child", "patched", "base", 1, "Child")


def test_replacements_keep_looks(toy, ledger):
    signature, doc = inspect.signature(toy.double), toy.double.__doc__
    apply(
        ledger,
        replace(f"{TOY}:double", halve),
        replace(f"{TOY}:Base.static", halve),
        replace(f"{TOY}:Base.size", lambda self: 7),
    )
    assert toy.double(8) == 4 and toy.double(8, by=4) == 2
    assert toy.Base.static(4) == 2 and toy.Base().size == 7
    assert isinstance(toy.double, types.FunctionType)
    assert inspect.signature(toy.double) == signature and toy.double.__doc__ == doc and toy.double.__name__ == "double"
    assert "Twice x" in __import__("pydoc").render_doc(toy.double)
    assert ledger.calls(f"{TOY}.double") == 2


def test_class_is_replaced_wherever_it_is_known(toy, ledger, user_module):
    new = type("Better", (toy.Base,), {})
    apply(ledger, replace(f"{TOY}:Base", new))
    assert toy.Base is new and user_module.Parent is new and toy.layer_spec.module is new
    with pytest.raises(LedgerError, match="counts calls"):
        ledger.calls(f"{TOY}:Base")
    ledger.revert()
    assert user_module.Parent is toy.Base is toy.layer_spec.module is not new


def test_unrelated_class_must_be_declared(toy, ledger):
    other = type("Other", (), {})
    with pytest.raises(TargetError, match="does not derive from"):
        apply(ledger, replace(f"{TOY}:Base", other))
    apply(ledger, replace(f"{TOY}:Base", other, unrelated=True))
    assert toy.Base is other


def test_data_is_set_without_touching_equal_data(toy, ledger, user_module):
    apply(ledger, set_value(f"{TOY}:nothing", 5), set_value(f"{TOY}:double.__kwdefaults__", {"by": 5}))
    assert toy.nothing == 5 and toy.also_nothing is None and user_module.unrelated is None
    assert toy.double(1) == 5
    ledger.revert()
    assert toy.nothing is None and toy.double(1) == 2


def test_dataclass_default_is_set_for_new_objects_of_subclasses_too(toy, ledger):
    apply(ledger, set_value(f"{TOY}:Config.hidden", 64))
    assert toy.Config().hidden == toy.SubConfig().hidden == toy.Config.hidden == 64
    assert toy.Config.__dataclass_fields__["hidden"].default == 64 and toy.Config(hidden=2).hidden == 2


def test_constants_are_rewritten_in_nested_code_and_tuples(toy, ledger):
    function = toy.kind_of
    apply(ledger, rewrite(f"{TOY}:kind_of", {"torch.cuda.FloatTensor": "torch.FloatTensor"}))
    assert toy.kind_of is function  # every reference sees it
    assert function("torch.FloatTensor") == "cuda" and function("torch.cuda.HalfTensor") == "cuda"
    assert function("x") == "torch.FloatTensor"


def test_constants_behind_a_decorator_are_found(toy, ledger):
    apply(ledger, rewrite(f"{TOY}:decorated", {"nccl": "gloo"}))
    assert toy.decorated("gloo") and not toy.decorated("nccl")


@pytest.mark.parametrize("constants", [{"absent": "x"}, {"torch.cuda.FloatTensor": "x", "absent": "y"}])
def test_constant_that_is_nowhere_is_an_error(toy, constants):
    with pytest.raises(TargetError, match="holds no constant 'absent'"):
        Plan.of([owned(rewrite(f"{TOY}:kind_of", constants))])


def test_equal_constants_of_other_type_stay(ledger):
    module = types.ModuleType("numbers_toy")
    exec("def f():\n    return (1, 1.0, True)\n", vars(module))
    sys.modules["numbers_toy"] = module
    try:
        apply(ledger, rewrite("numbers_toy:f", {1: 2}))
        assert [repr(item) for item in module.f()] == ["2", "1.0", "True"]
        ledger.revert()
        assert module.f() == (1, 1.0, True)
    finally:
        del sys.modules["numbers_toy"]


def test_new_names_must_be_new(toy, ledger):
    apply(ledger, add(f"{TOY}:extra", 3), add(f"{TOY}:Base.more", lambda self: self.value))
    assert toy.extra == 3 and toy.Child(9).more() == 9
    with pytest.raises(TargetError, match="exists already"):
        Plan.of([owned(add(f"{TOY}:double", 3))])
    ledger.revert()
    assert not hasattr(toy, "extra") and not hasattr(toy.Base, "more")


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (wrap(f"{TOY}:Base", plus_one), "wrap its __init__"),
        (wrap(f"{TOY}:flag_variable", plus_one), "cannot be called"),
        (replace(f"{TOY}:Base", halve), "is a class and"),
        (replace(f"{TOY}:double", 3), "cannot be called"),
        (rewrite(f"{TOY}:Base", {"a": "b"}), "holds no constant"),
    ],
)
def test_operations_that_make_no_sense_are_refused(toy, patch, words):
    with pytest.raises(TargetError, match=words):
        Plan.of([owned(patch)])


# --- aliases ----------------------------------------------------------------------------------------------


def test_aliases_under_any_name_are_rebound(toy, ledger, user_module):
    bound = functools.partial(toy.Base.forward)
    apply(ledger, wrap(f"{TOY}:double", plus_one), wrap(f"{TOY}:triple", plus_one), wrap(f"{TOY}:Base.forward", plus_one))
    assert user_module.twice(2) == 5 and user_module.Mine().run(2) == 5
    assert vars(user_module.Mine)["helper"] is toy.double
    assert toy.Config().activation(1) == 4 and toy.SubConfig().activation(1) == 4 and toy.Config.activation(1) == 4
    assert toy.layer_spec.params["bda"](1) == 3 and toy.layer_spec.submodules.mlp(1) == 4
    assert toy.Child().borrowed(1) == 3
    assert bound(toy.Base(), 1) == 2  # captured elsewhere: out of reach, as documented
    named = [alias for row in ledger for alias in row.aliases]
    for alias in (
        "a_users_module.twice",
        "a_users_module.Mine.helper",
        f"{TOY}.layer_spec.submodules.mlp",
        f"{TOY}.Child.borrowed",
    ):
        assert alias in named


def test_aliases_in_main_are_rebound():
    code = (
        "from tests.patching.toy import double as my_double\n"
        "from tests.patching import toy\n"
        "import dataclasses\n"
        "from mindspeed.patching import wrap\n"
        "from mindspeed.patching.plan import Plan\n"
        "patch = dataclasses.replace(wrap('tests.patching.toy:double', lambda o, x: o(x) + 1), owner='a')\n"
        "with Plan.of([patch]).applied() as ledger:\n"
        "    assert my_double(2) == 5 and '__main__.my_double' in ledger.rows[0].aliases\n"
        "assert my_double(2) == 4 and my_double is toy.double\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_modules_imported_while_patched_are_restored(toy, user_module):
    ledger = Ledger()
    original = toy.double
    apply(ledger, wrap(f"{TOY}:double", plus_one), owned(wrap(f"{TOY}:double", times_ten, after=("a",)), "b"))
    late = types.ModuleType("a_late_module")
    exec("from tests.patching.toy import double as d\nclass C:\n    f = d\ndef g(x, act=d):\n    return act(x)\n", vars(late))
    sys.modules["a_late_module"] = late
    try:
        assert late.d(1) == 30 and late.g(1) == 30
        ledger.revert()
        assert late.d is original and vars(late.C)["f"] is original and late.g.__defaults__ == (original,)
    finally:
        del sys.modules["a_late_module"]


def test_torch_keeps_the_truth_about_itself(ledger):
    import torch

    from tests.patching import toy_torch_user

    original = torch.nn.functional.silu
    apply(ledger, wrap("torch.nn.functional:silu", lambda original, x: "patched"))
    assert toy_torch_user.silu(None) == "patched"
    inside = sys.modules["torch.nn.modules.activation"].F.silu
    assert inside is torch.nn.functional.silu  # the named attribute itself is set
    ledger.revert()
    assert torch.nn.functional.silu is original is toy_torch_user.silu


def test_class_of_another_library_under_a_hosts_name_is_not_chased(toy, ledger, user_module):
    import torch

    toy.Adam = user_module.AdamW = torch.optim.AdamW
    try:
        apply(ledger, replace(f"{TOY}:Adam", type("OurAdam", (torch.optim.AdamW,), {})))
        assert toy.Adam.__name__ == "OurAdam" and user_module.AdamW is torch.optim.AdamW
        ledger.revert()
    finally:
        del toy.Adam


# --- stacking and conflicts -------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_declared_order_counts_and_registration_does_not(toy, ledger, reverse):
    patches = [owned(wrap(f"{TOY}:double", plus_one), "a"), owned(wrap(f"{TOY}:double", times_ten, after=("a",)), "b")]
    apply(ledger, *(reversed(patches) if reverse else patches))
    assert toy.double(1) == (2 + 1) * 10
    ledger.revert()
    swapped = [owned(wrap(f"{TOY}:double", plus_one, after=("b",)), "a"), owned(wrap(f"{TOY}:double", times_ten), "b")]
    apply(ledger, *swapped)
    assert toy.double(1) == 2 * 10 + 1


def test_order_of_two_features_must_be_declared(toy):
    patches = [
        owned(wrap(f"{TOY}:double", plus_one), "a", "--flag-a"),
        owned(wrap(f"{TOY}:double", times_ten), "b", "--flag-b 2"),
    ]
    with pytest.raises(ConflictError, match=r"'a' \(--flag-a\) and 'b' \(--flag-b 2\) both wrap .*double and neither says"):
        Plan.of(patches)


def test_indifferent_wraps_go_outside_and_layers_inside(toy, ledger):
    apply(
        ledger,
        owned(wrap(f"{TOY}:double", plus_one, after=("*",)), "a"),
        owned(wrap(f"{TOY}:double", times_ten), "b"),
        owned(wrap(f"{TOY}:double", lambda original, x: original(x) + 100), "platform.cpu"),
    )
    assert toy.double(1) == (2 + 100) * 10 + 1


def test_circular_order_is_refused(toy):
    patches = [
        owned(wrap(f"{TOY}:double", plus_one, after=("b",)), "a"),
        owned(wrap(f"{TOY}:double", times_ten, after=("a",)), "b"),
    ]
    with pytest.raises(ConflictError, match="circular"):
        Plan.of(patches)


def test_same_wrap_twice_is_once(toy, ledger):
    apply(ledger, wrap(f"{TOY}:double", plus_one), wrap(f"{TOY}:double", plus_one))
    assert toy.double(1) == 3
    apply(ledger, wrap(f"{TOY}.double", plus_one))  # the same owner again, in the other form
    assert toy.double(1) == 3 and len(ledger) == 1


def test_wraps_go_around_a_replacement(toy, ledger):
    apply(ledger, owned(wrap(f"{TOY}:double", plus_one), "a"), owned(replace(f"{TOY}:double", halve), "b"))
    assert toy.double(8) == 5
    assert [row.operation for row in ledger] == ["replace", "wrap"]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (replace(f"{TOY}:double", halve), replace(f"{TOY}.double", abs), "both replace tests.patching.toy:double; use one"),
        (set_value(f"{TOY}:nothing", 1), set_value(f"{TOY}:nothing", 2), "both set"),
        (add(f"{TOY}:extra", 1), add(f"{TOY}:extra", 2), "both add"),
        (replace(f"{TOY}:kind_of", halve), rewrite(f"{TOY}:kind_of", {"cuda": "cpu"}), "rewrite its constants"),
        (rewrite(f"{TOY}:kind_of", {"cuda": "cpu"}), rewrite(f"{TOY}:kind_of", {"cuda": "npu"}), "'cuda' .* differently"),
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_two_claims_are_refused_with_both_names_and_flags(toy, ledger, first, second, words, one_by_one):
    patches = [owned(first, "feature-a", "--a"), owned(second, "feature-b", "--b 2")]
    with pytest.raises((ConflictError, TargetError) if one_by_one else ConflictError) as caught:
        if one_by_one:
            Plan.of(patches[:1]).apply(ledger)
            Plan.of(patches[1:], ledger=ledger)
        else:
            Plan.of(patches)
    assert "'feature-a' (--a)" in str(caught.value) and "'feature-b' (--b 2)" in str(caught.value)
    if not one_by_one:
        assert caught.match(words)


def test_alias_and_definition_are_one_target(toy, user_module):
    patches = [owned(replace(f"{TOY}:double", halve), "a"), owned(replace("a_users_module:twice", abs), "b")]
    with pytest.raises(ConflictError, match="both replace"):
        Plan.of(patches)


def test_same_data_and_disjoint_constants_agree(toy, ledger):
    apply(
        ledger,
        owned(set_value(f"{TOY}:nothing", 4), "a"),
        owned(set_value(f"{TOY}:nothing", 4), "b"),
        owned(rewrite(f"{TOY}:kind_of", {"cuda": "cpu"}), "a"),
        owned(rewrite(f"{TOY}:kind_of", {"torch.cuda.HalfTensor": "half"}), "b"),
    )
    assert toy.nothing == 4 and toy.kind_of("half") == "cpu"


def test_declared_superseding_is_no_conflict(toy, ledger):
    plan = Plan.of(
        [owned(replace(f"{TOY}:double", halve), "a"), owned(replace(f"{TOY}:double", lambda x: -x, supersedes=("a",)), "b")]
    )
    plan.apply(ledger)
    assert toy.double(3) == -3 and [patch.owner for patch in plan.superseded] == ["a"]


def test_method_patches_survive_a_subclass_in_its_place(toy, ledger):
    derived = type("Derived", (toy.Base,), {})
    for order in (0, 1):
        patches = [owned(replace(f"{TOY}:Base", derived), "a"), owned(wrap(f"{TOY}:Base.forward", plus_one), "b")]
        apply(ledger, *(patches if order else reversed(patches)))
        assert toy.Base is derived and toy.Base().forward(1) == 3
        ledger.revert()
    apply(ledger, owned(replace(f"{TOY}:Base", derived), "a"))
    Plan.of([owned(wrap(f"{TOY}:Base.forward", plus_one), "b")], ledger=ledger).apply(ledger)  # one after the other
    assert "forward" not in vars(derived) and toy.Base().forward(1) == 3 and toy.Child().forward(1) == 3


def test_method_patches_that_would_be_lost_are_refused(toy):
    def deaf(self, x):
        return x

    class Polite(toy.Base):
        def forward(self, x):
            return super().forward(x)

    method = owned(wrap(f"{TOY}:Base.forward", plus_one), "b", "--b")
    for new in (type("Other", (), {}), type("Deaf", (toy.Base,), {"forward": deaf})):
        with pytest.raises(ConflictError, match=r"'a' \(--a\) and 'b' \(--b\) cannot be combined"):
            Plan.of([owned(replace(f"{TOY}:Base", new, unrelated=True), "a", "--a"), method])
    Plan.of([owned(replace(f"{TOY}:Base", Polite), "a", "--a"), method])


def test_compiled_functions_are_not_looked_through(toy, ledger):
    toy.double._torchdynamo_orig_callable = abs
    try:
        apply(ledger, wrap(f"{TOY}:double", plus_one))
        assert not hasattr(toy.double, "_torchdynamo_orig_callable") and toy.double(1) == 3
        ledger.revert()
    finally:
        del toy.double._torchdynamo_orig_callable


# --- undo and rollback ------------------------------------------------------------------------------------


def every_operation(toy):
    return [
        wrap(f"{TOY}:double", plus_one),
        wrap(f"{TOY}:Base.forward", plus_one),
        wrap(f"{TOY}:Child.forward", plus_one),
        wrap(f"{TOY}:Base.cached", plus_one),
        wrap(f"{TOY}:triple", plus_one),
        replace(f"{TOY}:Base.static", halve),
        replace(f"{TOY}:Overriding", type("Sub", (toy.Overriding,), {})),
        set_value(f"{TOY}:Config.hidden", 3),
        rewrite(f"{TOY}:kind_of", {"cuda": "cpu"}),
        add(f"{TOY}:extra", 1),
    ]


def test_a_failure_half_way_leaves_nothing(toy, ledger, user_module, monkeypatch):
    keep = owned(wrap(f"{TOY}:double", times_ten), "kept.layer")
    apply(ledger, keep)
    before = toy.double
    plan = Plan.of([owned(patch, "b") for patch in every_operation(toy)], ledger=ledger)
    import mindspeed.patching.plan as plans
    from mindspeed.patching.patch import Operation

    broken = dict(plans._APPLY) | {Operation.WRAP: lambda *_: (_ for _ in ()).throw(OSError("disk"))}
    monkeypatch.setattr(plans, "_APPLY", broken)
    with pytest.raises(OSError, match="disk"):
        plan.apply(ledger)
    assert len(ledger) == 1 and toy.double is before is user_module.twice and not hasattr(toy, "extra")


def test_fifty_rounds_leave_nothing(toy, user_module):
    # the fixture compares every attribute by identity afterwards
    for _ in range(50):
        with Plan.of([owned(patch) for patch in every_operation(toy)]).applied() as ledger:
            assert toy.double(1) == 3 and len(ledger) == 10
        assert len(ledger) == 0
    assert user_module.twice is toy.double


def test_undo_refuses_when_somebody_else_was_there(toy, user_module):
    ledger = Ledger()
    apply(ledger, wrap(f"{TOY}:double", plus_one), wrap(f"{TOY}:triple", plus_one))
    original, ours, theirs = ledger.rows[0].edits[0].old, toy.double, lambda x: 0
    toy.double = theirs
    with pytest.raises(
        LedgerError, match=r"someone else changed tests\.patching\.toy:double after us \(a\): it is now <function"
    ):
        ledger.revert()
    assert toy.double is theirs and len(ledger) == 2 and toy.triple(1) == 4  # nothing was undone
    ledger.revert(force=True)
    assert toy.double is original is not ours


def test_a_name_that_the_user_bound_anew_stays_his(toy, user_module):
    ledger = Ledger()
    apply(ledger, wrap(f"{TOY}:double", plus_one))
    user_module.twice = abs
    ledger.revert()
    assert user_module.twice is abs


def test_features_leave_and_the_ground_stays(toy):
    ledger = Ledger()
    apply(ledger, owned(wrap(f"{TOY}:double", plus_one), "platform.cpu"))
    apply(ledger, owned(wrap(f"{TOY}:double", times_ten), "feature"))
    assert toy.double(1) == 30
    ledger.revert_owner(lambda owner: owner == "feature")
    assert toy.double(1) == 3 and [row.owner for row in ledger] == ["platform.cpu"]
    apply(ledger, owned(wrap(f"{TOY}:double", times_ten), "feature"))
    with pytest.raises(LedgerError, match="feature patched it after platform.cpu"):
        ledger.revert_owner(lambda owner: owner == "platform.cpu")
    ledger.revert()


def test_notes_of_changes_without_way_back_stay(ledger):
    ledger.note("torch.cuda", owner="platform.npu", reason="torch_npu cannot take transfer_to_npu back")
    ledger.revert()
    assert [row.operation for row in ledger] == ["permanent"]


def test_rows_tell_what_why_and_how_often(toy, ledger):
    apply(ledger, owned(wrap(f"{TOY}:double", plus_one, reason="adds one"), "adder", "--adder 1"))
    toy.double(1)
    row = ledger.rows[0]
    assert (row.operation, row.target, row.owner, row.flag, row.reason) == (
        "wrap",
        f"{TOY}:double",
        "adder",
        "--adder 1",
        "adds one",
    )
    assert str(row).endswith("because --adder 1, called 1x") and "adder: wrap" in str(row)


# --- being a good citizen ---------------------------------------------------------------------------------


def _call_in_child(function, value, queue):
    queue.put(function(value))


@pytest.mark.parametrize(("method", "answer"), [("fork", 5), ("spawn", 4)])
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_patched_functions_pickle_by_name(toy, ledger, method, answer):
    apply(ledger, wrap(f"{TOY}:double", plus_one))
    assert pickle.loads(pickle.dumps(toy.double)) is toy.double
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    # a forked child has the patch; a spawned one starts afresh and finds the original by name
    child = context.Process(target=_call_in_child, args=(toy.double, 2, queue))
    child.start()
    assert queue.get(timeout=60) == answer
    child.join(60)


def test_applying_and_undoing_from_many_threads(toy):
    ledger, errors = Ledger(), []

    def work(name):  # features named like their targets
        try:
            for _ in range(10):
                Plan.of([owned(wrap(f"{TOY}:{name}", plus_one), name)]).apply(ledger)
                ledger.revert_owner(lambda owner: owner == name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("double", "triple", "kind_of", "Base.forward")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and len(ledger) == 0
