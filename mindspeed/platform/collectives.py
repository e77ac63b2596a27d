"""Collectives as every platform should offer them, built from what its backend really does.

gloo lacks lists of unequal length, sums 16-bit numbers with a rounding at every hop, reads tensors after the call
returned, and in some versions of torch ignores or refuses reductions other than SUM. Each gap is closed here, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FinishingWork:
    """Handle of a collective whose result still has to be brought to the caller's tensors.

    `finish` runs once, as soon as the collective has completed, whether or not anybody waits.
    """

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        self._work = work

        def when_done(future: Any) -> Any:
            result = future.value()  # raises what the collective raised
            finish()
            return result

        self._finished = work.get_future().then(when_done)

    def wait(self, *args: Any, **options: Any) -> bool:
        """Wait for the collective and for its result to be in place."""
        self._work.wait(*args, **options)
        self._finished.wait()
        return True

    def is_completed(self) -> bool:
        """Whether the result is in place."""
        return bool(self._finished.done())

    def get_future(self) -> Any:
        """Future that completes when the result is in place."""
        return self._finished

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def all_reduce_in(
    dtype: torch.dtype,
    all_reduce: Callable[..., Any],
    tensor: torch.Tensor,
    op: Any = torch.distributed.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce `tensor` in another dtype and round once into the caller's own tensor; contiguity does not matter."""
    wide = tensor.detach().to(dtype, memory_format=torch.contiguous_format)
    if wide.data_ptr() == tensor.data_ptr():
        return all_reduce(tensor, op, group, async_op)
    work = all_reduce(wide, op, group, async_op)

    def finish() -> None:
        tensor.detach().copy_(wide)

    if async_op:
        return None if work is None else FinishingWork(work, finish)
    finish()
    return work
