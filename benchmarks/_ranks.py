"""Costs of work on several ranks, for `Paired` rounds.

def body(world, length):                       # at the top of the module; runs on every rank
    q, k, v = ...
    return cost_here(world, lambda: ring_attention(q, k, v, group=world.group), clock="cpu")

round=lambda: {"ours": cost(2, body, 4096), "one process": cost(1, body, 4096)}
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mindspeed.testing.pool import pools


def cost_here(world: Any, call: Callable[[], Any], *, clock: str = "cpu", calls: int = 1) -> float:
    """Seconds of one call on this rank, between barriers and after one call that warms up.

    Args:
        clock: "cpu" for user and system time of this process, "wall" for elapsed time.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    call()
    world.barrier()
    start = now()
    for _ in range(calls):
        call()
    spent = now() - start
    world.barrier()
    return spent / calls


def cost(size: int, body: Callable[..., float], *args: Any, clock: str = "cpu", megatron: bool = False, **kwargs: Any) -> float:
    """Cost of `body` on `size` ranks: CPU seconds summed over ranks, or the wall time of the slowest."""
    costs = pools().get(size, megatron=megatron).run(body, *args, **kwargs)
    return sum(costs) if clock == "cpu" else max(costs)
