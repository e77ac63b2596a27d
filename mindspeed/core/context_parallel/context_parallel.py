"""Context parallelism: the flags that choose how a sequence is shared out, and their rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed.core.context_parallel.plan import (
    ADAPTIVE,
    ALGORITHMS,
    GATHER,
    HYBRID,
    HYBRID_ADAPTIVE,
    RING,
    ULYSSES,
    WITH_DEGREE,
    WITH_RING,
)
from mindspeed.notices import log_once, warn_once
from mindspeed.patching import Change, Feature, Problem, RunShape, flag

_SIZES = "--hierarchical-context-parallel-sizes"
_COMM_TYPES = {"p2p": RING, "a2a": ULYSSES, "allgather": GATHER, "a2a+p2p": HYBRID}


@dataclass(frozen=True, kw_only=True)
class ContextParallelFlags:
    """Flags of `ContextParallel`."""

    context_parallel_algo: str = flag(RING, "How a sequence is shared out over context-parallel ranks.", choices=ALGORITHMS)
    attention_mask_type: str = flag(
        "causal", "Sharding: causal balances the causal triangle, general cuts plain blocks.", choices=("causal", "general")
    )
    ulysses_degree_in_cp: int | None = flag(
        None, "Ranks that share heads in the hybrid algorithms; the rest form rings.", at_least=1
    )
    cp_window_size: int = flag(1, "Ranks per window of a double ring; 1 is the plain ring.", at_least=1)
    use_cp_send_recv_overlap: bool = flag(False, "Give rings a second communicator, to send and receive at the same time.")
    use_fused_ring_attention_update: bool = flag(False, "Merge partial results of the ring with one fused kernel.")
    megatron_cp_in_bnsd: bool = flag(False, "On NPU, hand ring attention to the kernel in BNSD layout; same numbers.")
    cp_kv_gradient_dtype: str = flag(
        "fp32", "What rings send gradients of keys and values in; bf16 halves these messages.", choices=("fp32", "bf16")
    )
    shape_order: str = flag(
        "SBH", "Accepted for old scripts; the layout is chosen by the kernel.", choices=("SBH", "BSH", "BSND")
    )


class ContextParallel(Feature):
    """Split every sequence over several devices."""

    flags = ContextParallelFlags
    needs = ("flash-attention",)
    switch = "--context-parallel-size above 1"

    def why(self, flags: ContextParallelFlags, run: RunShape) -> str:
        """`--context-parallel-size` above 1."""
        size = run.get("context_parallel_size") or 1
        return f"--context-parallel-size {size}" if size > 1 else ""

    def normalise(self, flags: ContextParallelFlags, run: RunShape) -> Iterator[Change]:
        """The host's own `--cp-comm-type` chooses an algorithm when ours was not given."""
        wanted = _from_comm_type(run)
        if wanted and "context_parallel_algo" not in run.given and flags.context_parallel_algo != wanted:
            yield Change("context_parallel_algo", wanted, f"--cp-comm-type {_comm_type(run)}")
        if wanted == HYBRID and flags.ulysses_degree_in_cp is None and run.get("hierarchical_context_parallel_sizes"):
            sizes = run.hierarchical_context_parallel_sizes
            yield Change("ulysses_degree_in_cp", int(sizes[0]), "first of --hierarchical-context-parallel-sizes")

    def check(self, flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
        """Every rule, with the numbers that break it."""
        yield from _comm_type_rules(flags, run)
        yield from _hierarchy_rules(run)
        yield from _degree_of_hierarchy(flags, run)
        yield from _length_rules(flags, run)
        yield from _head_rules(flags, run)
        yield from _degree_rules(flags, run)
        yield from _window_rules(flags, run)
        yield from _host_rules(flags, run)
        _hints(flags, run)

    def check_off(self, flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
        """The host refuses its own flag without us, in an assertion about Transformer Engine."""
        _old_names(run)
        yield from _hierarchy_rules(run)
        if (run.get("context_parallel_size") or 1) > 1:
            rule = f"needs --optimization-level 2 (given {run.get('optimization_level')})"
            yield Problem("--context-parallel-size", run.context_parallel_size, rule, "give it, or use size 1")


def _comm_type(run: RunShape) -> str | None:
    """The host's `--cp-comm-type`, when it was given."""
    if "cp_comm_type" not in run.given:
        return None
    given = run.cp_comm_type
    kinds = {given} if isinstance(given, str) else set(given)
    return kinds.pop() if len(kinds) == 1 else ", ".join(sorted(kinds))


def _from_comm_type(run: RunShape) -> str | None:
    return _COMM_TYPES.get(_comm_type(run) or "")


def _comm_type_rules(flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
    kind = _comm_type(run)
    if kind is None:
        return
    if kind not in _COMM_TYPES:
        rule = "different types per layer are not supported" if "," in kind else "is not a type"
        yield Problem("--cp-comm-type", kind, rule, f"use one of {', '.join(_COMM_TYPES)}")
    elif "context_parallel_algo" in run.given and flags.context_parallel_algo != _COMM_TYPES[kind]:
        rule = f"contradicts --context-parallel-algo {flags.context_parallel_algo}"
        yield Problem("--cp-comm-type", kind, rule, "give one of the two")


def _hierarchy_rules(run: RunShape) -> Iterator[Problem]:
    """The host makes groups of these sizes, whatever the algorithm."""
    sizes, size = run.get("hierarchical_context_parallel_sizes"), run.get("context_parallel_size") or 1
    if sizes and math.prod(map(int, sizes)) != size:
        rule = f"have the product {math.prod(map(int, sizes))}, not --context-parallel-size {size}"
        yield Problem(_SIZES, " ".join(map(str, sizes)), rule, "give the Ulysses degree and the size of rings, or remove it")


def _degree_of_hierarchy(flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
    sizes, degree = run.get("hierarchical_context_parallel_sizes"), flags.ulysses_degree_in_cp
    if not sizes:
        return
    if flags.context_parallel_algo not in WITH_DEGREE:
        warn_once(f"{_SIZES} has no effect with %s", flags.context_parallel_algo)
    elif degree and [int(sizes[0]), len(sizes)] != [degree, 2]:
        rule = f"are not those of --ulysses-degree-in-cp {degree} and its rings"
        fix = f"give {degree} {run.context_parallel_size // degree}, or one of the two flags"
        yield Problem(_SIZES, " ".join(map(str, sizes)), rule, fix)


def _length_rules(flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
    size, length = run.context_parallel_size, run.get("seq_length")
    if length is None:
        return
    zigzag = flags.context_parallel_algo in (*WITH_RING, GATHER) and (
        flags.attention_mask_type == "causal" or run.get("reset_attention_mask")
    )
    unit = 2 * size if zigzag else size
    if rest := length % unit:
        what = "2 x --context-parallel-size" if zigzag else "--context-parallel-size"
        rule = f"must be a multiple of {what} = {unit} for {flags.context_parallel_algo}"
        yield Problem("--seq-length", length, rule, f"use {length - rest or unit} or {length - rest + unit}")


def _head_rules(flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
    heads, tensor = run.get("num_attention_heads"), run.get("tensor_model_parallel_size") or 1
    if heads is None:
        return
    groups = run.get("num_query_groups") if run.get("group_query_attention") else heads
    if groups and heads % groups:
        yield Problem("--num-query-groups", groups, f"must divide --num-attention-heads {heads}", f"use {_divisors(heads)}")
    elif groups and groups % tensor:
        rule = f"must be a multiple of --tensor-model-parallel-size {tensor}"
        yield Problem("--num-query-groups", groups, rule, "change one of them")
    if flags.context_parallel_algo == ULYSSES:
        degree, name = run.context_parallel_size, f"--context-parallel-size {run.context_parallel_size}"
    elif flags.context_parallel_algo in WITH_DEGREE and flags.ulysses_degree_in_cp:
        degree, name = flags.ulysses_degree_in_cp, f"--ulysses-degree-in-cp {flags.ulysses_degree_in_cp}"
    else:
        return
    if heads % (degree * tensor):
        rule = f"must be divisible by {name} x --tensor-model-parallel-size {tensor} for {flags.context_parallel_algo}"
        usable = [d for d in range(2, heads // tensor + 1) if heads % (d * tensor) == 0] if heads % tensor == 0 else []
        yield Problem("--num-attention-heads", heads, rule, f"usable sizes: {', '.join(map(str, usable)) or 'none'}")


def _degree_rules(flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
    size, degree, algorithm = run.context_parallel_size, flags.ulysses_degree_in_cp, flags.context_parallel_algo
    if algorithm not in WITH_DEGREE:
        return
    if degree is None:
        fix = f"use {_divisors(size, proper=True)}"
        yield Problem("--ulysses-degree-in-cp", None, f"is required by {algorithm}", fix)
    elif degree == size:
        rule = f"equals --context-parallel-size {size}: no ring is left for {algorithm}"
        yield Problem("--ulysses-degree-in-cp", degree, rule, f"use --context-parallel-algo {ULYSSES}")
    elif size % degree:
        rule = f"must divide --context-parallel-size {size}"
        yield Problem("--ulysses-degree-in-cp", degree, rule, f"use {_divisors(size, proper=True)}")
    elif degree == 1:
        log_once("--ulysses-degree-in-cp 1: %s is the same without Ulysses", algorithm)


def _window_rules(flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
    window, algorithm = flags.cp_window_size, flags.context_parallel_algo
    if window == 1 or algorithm not in WITH_RING:
        return
    ring = run.context_parallel_size // ((flags.ulysses_degree_in_cp or 1) if algorithm == HYBRID else 1)
    if window >= ring or ring % window:
        rule = f"must be smaller than, and divide, the ring of {ring} ranks"
        yield Problem("--cp-window-size", window, rule, f"use {_divisors(ring, proper=True)}")


def _host_rules(flags: ContextParallelFlags, run: RunShape) -> Iterator[Problem]:
    if run.get("mtp_num_layers"):
        yield Problem(
            "--mtp-num-layers", run.mtp_num_layers, "does not work with context parallelism in this host", "remove it"
        )
    if run.get("window_size"):
        yield Problem("window_size", run.window_size, "is not supported by our attention", "use --pre-tockens")
    if run.get("deterministic_mode") and run.platform not in ("cpu",):
        rule = f"is not proved for context parallelism on {run.platform}"
        yield Problem("--deterministic-mode", None, rule, "remove it or use the cpu platform")
    adaptive = flags.context_parallel_algo in (ADAPTIVE, HYBRID_ADAPTIVE)
    if adaptive and run.get("reset_attention_mask"):
        yield Problem("--reset-attention-mask", None, f"does not work with {flags.context_parallel_algo}", f"use {RING}")


def _hints(flags: ContextParallelFlags, run: RunShape) -> None:
    """Flags that scripts carry along and that mean nothing here: said once."""
    algorithm = flags.context_parallel_algo
    if flags.ulysses_degree_in_cp and algorithm not in WITH_DEGREE:
        warn_once("--ulysses-degree-in-cp has no effect with %s", algorithm)
    if flags.cp_window_size > 1 and algorithm not in WITH_RING:
        warn_once("--cp-window-size has no effect with %s", algorithm)
    if flags.use_cp_send_recv_overlap and algorithm not in WITH_RING:
        warn_once("--use-cp-send-recv-overlap has no effect with %s", algorithm)
    if flags.use_fused_ring_attention_update and algorithm not in WITH_RING:
        warn_once("--use-fused-ring-attention-update has no effect with %s", algorithm)
    if flags.cp_kv_gradient_dtype != "fp32" and algorithm in (ULYSSES, GATHER):
        warn_once("--cp-kv-gradient-dtype has no effect with %s", algorithm)
    if flags.megatron_cp_in_bnsd and run.platform != "npu":
        log_once("--megatron-cp-in-bnsd concerns the NPU kernel; nothing changes on %s", run.platform)
    _old_names(run)


def _old_names(run: RunShape) -> None:
    if "shape_order" in run.given:
        warn_once("--shape-order is accepted for old scripts and has no effect")


def _divisors(number: int, *, proper: bool = False) -> str:
    """Divisors for a message; proper ones leave out 1 and the number."""
    found = [d for d in range(1, number + 1) if number % d == 0 and not (proper and d in (1, number))]
    return " or ".join(map(str, found)) or "another --context-parallel-size"
