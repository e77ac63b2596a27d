"""The trainer as a host: logical names resolve, events come in order, features work by their flags alone."""

from __future__ import annotations

import argparse
import importlib

import pytest

from mindspeed.errors import TargetError
from mindspeed.host.protocol import Host
from mindspeed.host.trainer import FUNCTIONS, TrainerHost
from tests.training.runs import TINY, train

NEEDED = (
    "pretrain setup_model_and_optimizer get_model train train_step training_log evaluate evaluate_and_print_results save_checkpoint "
    "load_checkpoint get_args get_timers get_tensorboard_writer num_floating_point_operations core_transformer_config_from_args "
    "get_batch_on_this_tp_rank get_batch_on_this_cp_rank"
).split()


def test_the_hosts_names_are_there():
    assert set(NEEDED) <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_logical_target(name):
    target = TrainerHost(argparse.Namespace()).target(f"training:{name}")
    module, _, attribute = target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    assert callable(function) and function.__module__ == module


def test_protocol_and_other_targets():
    host = TrainerHost(argparse.Namespace())
    assert isinstance(host, Host) and host.kind == "trainer"
    assert host.target("megatron.core.utils:divide") == "megatron.core.utils:divide"
    with pytest.raises(TargetError, match="has no training:fly"):
        host.target("training:fly")


def test_events_in_order(tmp_path, monkeypatch):
    from mindspeed.host import events

    seen = []
    fire = events.Events.fire
    monkeypatch.setattr(
        events.Events, "fire", lambda self, event, **details: (seen.append(event), fire(self, event, **details))[1]
    )
    train(f"{TINY} --train-iters 2 --save {tmp_path}/ckpt --save-interval 1 --data-cache-path {tmp_path}/cache")
    step = ["step_begin", "step_end", "log_line", "checkpoint_save", "checkpoint_saved"]
    assert seen == [
        "groups_created",
        "model_built",
        "optimizer_built",
        "train_begin",
        *step,
        *step,
        "train_end",
        "groups_destroyed",
        "reverted",
    ]
    seen.clear()
    train(f"{TINY} --train-iters 2 --load {tmp_path}/ckpt --data-cache-path {tmp_path}/cache")
    assert seen.index("optimizer_built") < seen.index("checkpoint_load") and "train_begin" not in seen


def test_a_feature_works_by_its_flag(tmp_path):
    """No-op layers: six slots of which two are empty train exactly as four layers do."""
    import mindspeed

    cache = f"--data-cache-path {tmp_path}"
    plain = train(f"{TINY} {cache} --init-method-std 0.02")
    slots = train(f"{TINY.replace('--num-layers 4', '--num-layers 6')} {cache} --noop-layers 1,4")
    assert "noop-layers" in slots.text and len(slots.curve) == len(plain.curve) == 3
    assert not mindspeed.patches()  # everything is undone when the run has ended
    assert slots.iteration == 3 and float(slots.curve[0][1]) == pytest.approx(float(plain.curve[0][1]), abs=0.2)


def test_patches_of_the_loop_take_effect(tmp_path):
    """A feature that wraps the trainer's own functions by logical names is called."""
    from mindspeed.patching.ledger import Ledger
    from mindspeed.patching.patch import wrap
    from mindspeed.patching.plan import Plan

    host = TrainerHost(argparse.Namespace())
    counts: dict[str, int] = {}

    def counting(name):
        def advice(original, *args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        return advice

    names = [
        "train", "train_step", "training_log", "get_model", "setup_model_and_optimizer", "save_checkpoint", "get_batch_on_this_tp_rank",
        "get_batch_on_this_cp_rank", "num_floating_point_operations", "core_transformer_config_from_args", "evaluate",
        "evaluate_and_print_results", "get_args",
    ]  # fmt: skip
    ledger = Ledger()
    Plan.of(wrap(host.target(f"training:{name}"), counting(name)) for name in names).apply(ledger)
    try:
        flags = TINY.replace("--eval-iters 0", "--eval-iters 1 --eval-interval 3")
        train(f"{flags} --save {tmp_path}/ckpt --save-interval 3 --data-cache-path {tmp_path}/cache")
    finally:
        ledger.revert()
    assert counts.pop("get_args") > 10
    assert counts == {
        "train": 1, "train_step": 3, "training_log": 3, "get_model": 1, "setup_model_and_optimizer": 1, "save_checkpoint": 1,
        "get_batch_on_this_tp_rank": 12 + 12, "get_batch_on_this_cp_rank": 12 + 12, "num_floating_point_operations": 6,
        "core_transformer_config_from_args": 2, "evaluate": 3, "evaluate_and_print_results": 3,
    }  # fmt: skip


def test_model_provider_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from mindspeed.training.model import model_provider\n"
        "def provide(pre_process=True, post_process=True):\n"
        "    print('my model')\n"
        "    return model_provider(pre_process, post_process)\n"
    )
    run = train(f"{TINY} --data-cache-path {tmp_path}/cache --model-provider {tmp_path}/mine.py:provide")
    assert "my model" in run.text


@pytest.mark.parametrize(("text", "told"), [("nowhere.py:f", "there is no file"), ("{}/mine.py:g", "has no function 'g'")])
def test_wrong_model_provider(tmp_path, text, told):
    from mindspeed.errors import DataError

    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(DataError, match=told):
        train(f"{TINY} --data-cache-path {tmp_path}/cache --model-provider {text.format(tmp_path)}")
