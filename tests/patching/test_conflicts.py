"""Several patches on one target: order, agreement, refusal."""

import pytest

from mindspeed.errors import ConflictError, TargetError
from mindspeed.patching import add, replace, rewrite, set_value, wrap
from mindspeed.patching.plan import Plan
from tests.patching.conftest import TOY, apply, halve, owned, plus_one, times_ten


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
