"""Does a process group's backend perform a reduction, or does it ignore or refuse it? Asked with known numbers."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
Native = Callable[..., Any]
_PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


def op_name(op: Any) -> str:
    """SUM, AVG, ... of a reduction, or its text when it is none of the plain ones."""
    return next((name for name in OPS if op == getattr(dist.ReduceOp, name)), str(op))


class OpProbe:
    """Whether a group's backend really performs a reduction; asked once by all its ranks, with known numbers."""

    def __init__(self, natives: Mapping[str, Native]) -> None:
        self._natives = natives
        self._answers: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], bool]] = weakref.WeakKeyDictionary()

    def performs(self, form: str, op: Any, group: Any) -> bool:
        """Whether collective `form` gives the right result for `op`; collective over `group` when asked the first time."""
        name = op_name(op)
        if name == "SUM" or name not in OPS:
            return True
        answers = self._answers.setdefault(group, {})
        if (form, name) not in answers:
            with outside_coalescing(group):
                answers[form, name] = self._ask(form, op, name, group)
            if not answers[form, name]:
                backend = dist.get_backend(group)
                logger.info("%s does not perform %s in %s; it is emulated exactly", backend, name, form)
        return answers[form, name]

    def _ask(self, form: str, op: Any, name: str, group: Any) -> bool:
        """The same answer on all ranks: that nobody saw a wrong result."""
        wrong = torch.tensor([int(not self._is_right(form, op, name, group))])
        self._natives["all_reduce"](wrong, op=dist.ReduceOp.SUM, group=group)
        return not wrong.item()

    def _is_right(self, form: str, op: Any, name: str, group: Any) -> bool:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        dtype = torch.int64 if name in ("BAND", "BOR", "BXOR") else torch.float32
        out = mine = torch.full((size,), rank + 2, dtype=dtype)
        native = self._natives[form]
        try:
            if form == "all_reduce":
                native(mine, op=op, group=group)
            elif form == "reduce":
                native(mine, group_dst=0, op=op, group=group)
            else:
                out = torch.empty(1, dtype=dtype)
                native(out, list(mine.split(1)) if form == "reduce_scatter" else mine, op=op, group=group)
        except (RuntimeError, ValueError):
            return False
        right = combined([torch.tensor(other + 2, dtype=dtype) for other in range(size)], name)
        return bool((out == right).all()) or (form == "reduce" and rank != 0)


def combined(values: Sequence[Tensor], name: str) -> Tensor:
    """The reduction called `name` of equally shaped tensors, in their order."""
    if name in ("SUM", "AVG"):
        total = torch.stack(list(values)).sum(dim=0, dtype=values[0].dtype)
        return total if name == "SUM" else total.div(len(values))
    return functools.reduce(_PAIRWISE[name], values)


@contextlib.contextmanager
def outside_coalescing(group: Any) -> Iterator[None]:
    """Run collectives of `group` at once although torch is collecting them for later."""
    waiting = dist.distributed_c10d._world.pg_coalesce_state
    held = waiting.pop(group, None)
    try:
        yield
    finally:
        if held is not None:
            waiting[group] = held
