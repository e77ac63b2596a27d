"""What the cache policies of the ring trade: bytes that no longer travel in backward for bytes that stay in memory."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks._case import Check, Counted, Run, case
from benchmarks.cp.bench_counts import D, N, S, count_on_rank
from mindspeed.core.context_parallel.plan import RING, ContextPlan
from mindspeed.testing.pool import pools

RANKS = 4
TRAVEL_IN_BACKWARD = {"full": 2, "half": 3}
"""Tensors as large as a rank's keys: the gradients of keys and values always travel, values again if only keys were kept."""


def _cache_case(policy: str) -> Callable[[Run], Counted]:
    @case(f"cp.cache.{policy}.bytes", feature="kv-cache-policy", metric="fraction", better="equal", must=1.0, unit="bytes")
    def sent(run: Run) -> Counted:
        """Bytes that a rank of a ring sends with the cache policy, both ways, beside what must travel."""
        found, without = (
            pools().get(RANKS).run(count_on_rank, ContextPlan(RING, RANKS, cache=cache), N) for cache in (policy, None)
        )
        block = S // RANKS * N * D * 4
        return Counted(
            ours=max(traffic[1] for traffic, _ in found),
            floor=(RANKS - 1) * (2 + TRAVEL_IN_BACKWARD[policy]) * block,
            peers={"no policy": max(traffic[1] for traffic, _ in without)},
            check=Check(max(error for _, error in found), 1e-5, "relative error of output and gradients"),
            workload={"ranks": RANKS, "seq": S, "heads": N, "head size": D, "dtype": "fp32", "policy": policy},
        )

    return sent


CASES = tuple(map(_cache_case, TRAVEL_IN_BACKWARD))
