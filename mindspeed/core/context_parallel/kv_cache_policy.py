"""What context-parallel attention keeps for backward: traffic for memory in a ring, memory for traffic in Ulysses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed.core.context_parallel.plan import ULYSSES, WITH_RING
from mindspeed.patching import Feature, Problem, RunShape, flag


@dataclass(frozen=True, kw_only=True)
class KvCacheFlags:
    """Flags of `KvCachePolicy`."""

    context_parallel_kv_cache_policy: str | None = flag(
        None,
        "Ring: keep received keys and values (full) or keys (half) for backward, less traffic for more memory. "
        "Ulysses: keep the ones from before the exchange, less memory for more traffic.",
        choices=("full", "half"),
    )
    context_parallel_cache_interval: int = flag(
        0, "Layers between two that use the cache policy; 0 is every layer.", at_least=0
    )
    use_ulysses_allgather_kv: bool = flag(
        False, "Ulysses with one key head per rank: gather keys and values along the sequence."
    )


class KvCachePolicy(Feature):
    """Choose what context-parallel attention keeps of keys and values for backward."""

    flags = KvCacheFlags
    needs = ("flash-attention",)

    def check(self, flags: KvCacheFlags, run: RunShape) -> Iterator[Problem]:
        """Every rule, with the numbers that break it."""
        size, algorithm = run.get("context_parallel_size") or 1, run.get("context_parallel_algo")
        policy, interval = flags.context_parallel_kv_cache_policy, flags.context_parallel_cache_interval
        if policy is not None:
            yield from _policy_rules(policy, size, algorithm, flags, run)
        elif interval:
            fix = "add --context-parallel-kv-cache-policy full or half"
            yield Problem("--context-parallel-cache-interval", interval, "needs a cache policy", fix)
        if interval and interval >= run.num_layers:
            rule = f"must be smaller than --num-layers {run.num_layers}"
            yield Problem("--context-parallel-cache-interval", interval, rule, f"use 0 to {run.num_layers - 1}")
        if flags.use_ulysses_allgather_kv:
            yield from _allgather_rules(size, algorithm, run)


def _policy_rules(policy: str, size: int, algorithm: str | None, flags: KvCacheFlags, run: RunShape) -> Iterator[Problem]:
    name = "--context-parallel-kv-cache-policy"
    if size == 1:
        yield Problem(name, policy, "needs --context-parallel-size above 1", "remove it")
    elif algorithm not in (*WITH_RING, ULYSSES):
        yield Problem(name, policy, f"does not work with {algorithm}", f"use {', '.join((*WITH_RING, ULYSSES))}")
    elif algorithm == ULYSSES and not flags.use_ulysses_allgather_kv:
        groups = _groups_per_rank(run)
        if math.lcm(groups, size) == groups:
            rule = f"saves nothing: {groups} key heads per rank need no repetition over {size} ranks"
            yield Problem(name, policy, rule, "remove it")


def _allgather_rules(size: int, algorithm: str | None, run: RunShape) -> Iterator[Problem]:
    name = "--use-ulysses-allgather-kv"
    if size == 1:
        yield Problem(name, None, "needs --context-parallel-size above 1", "remove it")
    elif algorithm != ULYSSES:
        yield Problem(name, None, f"needs --context-parallel-algo {ULYSSES} (given {algorithm})", f"use {ULYSSES} or remove it")
    if not run.get("group_query_attention"):
        yield Problem(name, None, "needs --group-query-attention", "add it or remove the flag")
    elif (groups := _groups_per_rank(run)) != 1:
        rule = f"needs one key head per tensor-parallel rank, there are {groups}"
        yield Problem(name, None, rule, "use --num-query-groups equal to --tensor-model-parallel-size, or remove it")


def _groups_per_rank(run: RunShape) -> int:
    """Key heads of one tensor-parallel rank."""
    groups = run.get("num_query_groups") if run.get("group_query_attention") else run.num_attention_heads
    return max(1, int(groups or 1) // (run.get("tensor_model_parallel_size") or 1))
