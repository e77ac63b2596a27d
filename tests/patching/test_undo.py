"""Undo, roll-back, and patched functions in other threads and processes."""

import multiprocessing
import pickle
import threading

import pytest

from mindspeed.errors import LedgerError
from mindspeed.patching import add, replace, rewrite, set_value, wrap
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.plan import Plan
from tests.patching.conftest import TOY, apply, halve, owned, plus_one, times_ten

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
