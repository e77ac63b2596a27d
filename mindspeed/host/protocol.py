"""What a feature may ask of the program it runs in; implemented for Megatron-LM, our trainer and plain programs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mindspeed.host.events import Events

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GROUPS = ("world", "tp", "pp", "dp", "dp_cp", "cp", "ep", "etp", "tp_cp", "tp_ep", "mp", "embd")


@runtime_checkable
class Host(Protocol):
    """A program that trains with megatron-core.

    Attributes:
        kind: "megatron-lm" (a checkout with megatron.training), "trainer" (ours) or "program" (`enable()`).
        args: the run's arguments after validation.
        events: subscriptions of this activation.
    """

    kind: str
    args: argparse.Namespace
    events: Events

    def target(self, logical: str) -> str:
        """Real target text of a logical one: `training:train_step` -> `megatron.training.training:train_step`."""
        ...

    def group(self, name: str) -> ProcessGroup:
        """Process group by short name (see `GROUPS`); valid from the event `groups_created` on."""
        ...

    def size(self, name: str) -> int:
        """World size of a group by short name."""
        ...

    def rank(self, name: str) -> int:
        """Rank of this process in a group by short name."""
        ...

    def load(self, target: str) -> Any:
        """The object that a target names in this host, e.g. a base class to extend."""
        ...
