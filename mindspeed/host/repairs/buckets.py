"""Keep every gradient bucket inside its own range when a shared embedding forces an early bucket end.

`_ParamAndGradBuffer.__init__` pads the end of such a bucket but, when the end happens to be divisible by the
data-parallel size, starts the next parameter at the unpadded place: `Param should not be in param_gbuf_map`
(hidden sizes that are not multiples of 128). The test it makes is `start % data_parallel_world_size`; while
the buffer is laid out we answer with the full divisor of a bucket end, which turns "divisible" into
"aligned". Layouts that were right stay the same, so checkpoints stay interchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from mindspeed.patching.patch import Patch, add, wrap
from mindspeed.platform import Platform

BUFFER = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer"
_ALIGNMENT = 128  # elements: 256 bytes of a 16-bit type
_BUSBW_ALIGNMENT = 2**16


class LayoutSize:
    """Descriptor of `data_parallel_world_size`: the divisor of bucket ends during layout, the size after it."""

    def __get__(self, buffer: Any, owner: type | None = None) -> Any:
        if buffer is None:
            return self
        state = buffer.__dict__
        size = state["data_parallel_world_size"]
        if not state.get("_laying_out") or not buffer.ddp_config.use_distributed_optimizer:
            return size
        busbw = _BUSBW_ALIGNMENT if buffer.ddp_config.pad_buckets_for_high_nccl_busbw else 1
        return math.lcm(size, _ALIGNMENT, busbw)

    def __set__(self, buffer: Any, size: int) -> None:
        buffer.__dict__["data_parallel_world_size"] = size


def lay_out(original: Callable[..., None], buffer: Any, *args: Any, **kwargs: Any) -> None:
    """Run the host's constructor with the strict divisor in force."""
    buffer.__dict__["_laying_out"] = True
    try:
        original(buffer, *args, **kwargs)
    finally:
        del buffer.__dict__["_laying_out"]


def patches(platform: Platform) -> Iterator[Patch]:
    """Add the descriptor and mark the time of layout."""
    why = "a shared-embedding bucket must start where the bucket before it ends, padding included"
    yield add(f"{BUFFER}.data_parallel_world_size", LayoutSize(), reason=why)
    yield wrap(f"{BUFFER}.__init__", lay_out, reason=why)
