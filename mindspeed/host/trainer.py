"""The built-in trainer as a host: its functions under their logical names, megatron-core's groups, its events."""

from __future__ import annotations

import argparse
from typing import Any

from mindspeed.errors import TargetError
from mindspeed.host.events import Events
from mindspeed.host.groups import ParallelGroups
from mindspeed.patching.resolve import load

# logical name -> module of mindspeed.training that defines it
FUNCTIONS: dict[str, str] = {
    "build_pretraining_data_loader": "data",
    "build_train_valid_test_data_iterators": "data",
    "calc_params_l2_norm": "report",
    "core_transformer_config_from_args": "arguments",
    "evaluate": "evaluation",
    "evaluate_and_print_results": "evaluation",
    "forward_step": "forward",
    "generate_state_dict": "checkpoint_state",
    "get_args": "session",
    "get_batch": "data",
    "get_batch_on_this_cp_rank": "data",
    "get_batch_on_this_tp_rank": "data",
    "get_model": "model",
    "get_optimizer_param_scheduler": "model",
    "get_rng_state": "checkpoint_state",
    "get_tensorboard_writer": "session",
    "get_timers": "session",
    "get_tokenizer": "session",
    "load_checkpoint": "checkpointing",
    "loss_func": "forward",
    "model_provider": "model",
    "num_floating_point_operations": "logging",
    "pretrain": "pretraining",
    "print_rank_0": "report",
    "print_rank_last": "report",
    "save_checkpoint": "checkpointing",
    "setup_model_and_optimizer": "model",
    "train": "loop",
    "train_step": "loop",
    "train_valid_test_datasets_provider": "data",
    "training_log": "logging",
    "unwrap_model": "checkpoint_state",
}


class TrainerHost(ParallelGroups):
    """Answers features' questions for `mindspeed pretrain`. The loop fires the events itself."""

    kind = "trainer"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.events = Events()

    def target(self, logical: str) -> str:
        """`training:train_step` -> `mindspeed.training.loop:train_step`; other targets stay as they are.

        Raises:
            TargetError: the trainer has no function of this name.
        """
        space, _, name = logical.partition(":")
        if space != "training":
            return logical
        function, dot, attribute = name.partition(".")
        if function not in FUNCTIONS:
            raise TargetError(f"the built-in trainer has no {logical}; it has {', '.join(FUNCTIONS)}")
        return f"mindspeed.training.{FUNCTIONS[function]}:{function}{dot}{attribute}"

    def load(self, target: str) -> Any:
        """The object that a target names."""
        return load(self.target(target))
