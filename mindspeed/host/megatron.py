"""Megatron-LM as a host: its groups, its training loop's functions, and the moments it can announce."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from mindspeed.errors import TargetError
from mindspeed.host.events import Events
from mindspeed.host.groups import ParallelGroups
from mindspeed.host.megatron_checkpoints import CheckpointGuard
from mindspeed.host.megatron_events import event_patches
from mindspeed.patching.patch import Patch
from mindspeed.patching.resolve import resolve

EVENT_OWNER = "host.events"
CHECKPOINT_OWNER = "host.checkpoints"
# Modules of megatron.training that hold the functions which logical targets name, in order of search.
_TRAINING_MODULES = (
    "megatron.training.training",
    "megatron.training.checkpointing",
    "megatron.training.arguments",
    "megatron.training.initialize",
    "megatron.training.utils",
    "megatron.training.global_vars",
    "megatron.training.tokenizer.tokenizer",
    "megatron.training.yaml_arguments",
)


class MegatronHost(ParallelGroups):
    """A Megatron-LM checkout; see `mindspeed.host.protocol.Host`."""

    kind = "megatron-lm"

    def __init__(self, args: argparse.Namespace | None = None) -> None:
        self.args = args or argparse.Namespace()  # empty until the host has validated them
        self.events = Events()
        self._checkpoints = CheckpointGuard(self)

    def target(self, logical: str) -> str:
        """`training:train_step` -> `megatron.training.training:train_step`; other texts stay.

        Raises:
            TargetError: no module of megatron.training defines that name.
        """
        if not logical.startswith("training:"):
            return logical
        name = logical.partition(":")[2]
        for module in _TRAINING_MODULES:
            if _defines(module, name):
                return f"{module}:{name}"
        raise TargetError(f"megatron.training has no function {name!r}; looked in {', '.join(_TRAINING_MODULES)}")

    def load(self, target: str) -> Any:
        """The object that a target names."""
        return resolve(self.target(target)).value

    def event_patches(self) -> Iterator[Patch]:
        """Patches that fire the events which somebody subscribed to, and those that keep checkpoints whole."""
        for owner, patches in ((EVENT_OWNER, event_patches(self)), (CHECKPOINT_OWNER, self._checkpoints.patches())):
            for patch in patches:
                yield dataclasses.replace(patch, owner=owner, target=self.target(patch.target))


def _defines(module: str, name: str) -> bool:
    """Whether a module holds a function of that name that it defines itself (not one imported from elsewhere)."""
    try:
        value = resolve(f"{module}:{name.partition('.')[0]}").value
    except TargetError:
        return False
    home = getattr(value, "__wrapped__", value)
    return getattr(home, "__module__", module) in (module, None)
