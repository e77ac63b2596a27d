"""What context parallelism sends, keeps, hides and balances: counted beside what each algorithm needs at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks._case import Check, Counted, Run, case
from benchmarks.cp._setup import attention, both_ways, error_on_rank, groups_of, relative, share, whole_inputs
from mindspeed.core.attention import Accumulator, GradientSum
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.plan import GATHER, HYBRID, RING, ULYSSES, ContextPlan
from mindspeed.core.context_parallel.tiles import visible_entries
from mindspeed.core.context_parallel.work import AttentionOptions, backward_block, forward_block, plan_work
from mindspeed.testing.pool import pools

S, N, D = 256, 8, 16
PLANS = {
    "ring": ContextPlan(RING, 2),
    "ring4": ContextPlan(RING, 4),
    "double-ring4": ContextPlan(RING, 4, window=2),
    "ulysses": ContextPlan(ULYSSES, 2),
    "hybrid4": ContextPlan(HYBRID, 4, degree=2),
    "gather": ContextPlan(GATHER, 2),
    "ulysses4": ContextPlan(ULYSSES, 4),
    "gather4": ContextPlan(GATHER, 4),
    "ring8": ContextPlan(RING, 8),
    "double-ring8": ContextPlan(RING, 8, window=4),
    "ulysses8": ContextPlan(ULYSSES, 8),
    "hybrid8": ContextPlan(HYBRID, 8, degree=2),
    "gather8": ContextPlan(GATHER, 8),
}
FULL_PRESET = ("ulysses4", "gather4", "ring8", "double-ring8", "ulysses8", "hybrid8", "gather8")
Traffic = tuple[int, int]  # messages or collectives, bytes that leave the rank


def least_traffic(plan: ContextPlan, groups: int) -> Traffic:
    """Forward and backward of one layer and rank in fp32, where gradients are as wide as activations."""
    share = S // plan.size
    calls, elements = 0, 0
    if plan.algorithm == GATHER:  # keys and values forward and again backward, gradients scattered
        block = share * groups * D
        return 6, 4 * (plan.size - 1) * 6 * block
    if plan.ulysses > 1:  # q, k, v in one exchange and the output in another, both ways
        repeated = max(groups, plan.ulysses)
        calls += 4
        elements += 2 * (plan.ulysses - 1) * share * D * (2 * N + 2 * repeated) // plan.ulysses
    if plan.ring > 1:  # keys with values forward, and backward along with their gradients
        heads = max(groups, plan.ulysses) // plan.ulysses
        calls += 3 * (plan.ring - 1)
        elements += 3 * (plan.ring - 1) * 2 * share * plan.ulysses * heads * D
    return calls, 4 * elements


def count_on_rank(world: Any, plan: ContextPlan, groups: int) -> tuple[Traffic, float]:
    from mindspeed.testing import count_communication

    layout, communicators = plan.layout(S), groups_of(plan, world)
    inputs = share(whole_inputs(S, N, groups, D, torch.float32), layout, world.rank)
    layer = attention(plan, communicators, layout, D)
    both_ways(layer, *inputs)  # the first call of a shape compares it between ranks
    with count_communication() as counted:
        both_ways(layer, *inputs)
    kinds = ("send", "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast")
    calls, sent = (sum(count(kind) for kind in kinds) for count in (counted.calls, counted.bytes))
    communicators.drop()
    return (calls, sent), error_on_rank(world, plan, (S, N, groups, D), torch.float32)


def _traffic(name: str, groups: int, what: int) -> Counted:
    plan = PLANS[name]
    found = pools().get(plan.size).run(count_on_rank, plan, groups)
    error = max(error for _, error in found)
    return Counted(
        ours=max(traffic[what] for traffic, _ in found), floor=least_traffic(plan, groups)[what],
        check=Check(error, 1e-5, "relative error of output and gradients"),
        workload={"ranks": plan.size, "seq": S, "heads": N, "key heads": groups, "head size": D, "dtype": "fp32"},
    )  # fmt: skip


def _traffic_case(name: str, groups: int, what: int) -> Callable[[Run], Counted]:
    kind, heads = ("calls", "bytes")[what], "mha" if groups == N else "gqa"

    @case(
        f"cp.{kind}.{name}.{heads}", feature="context-parallel", metric="fraction", better="equal", must=1.0, unit=kind,
        preset="smoke" if name in ("ring", "ulysses") else "full" if name in FULL_PRESET else "standard",
    )  # fmt: skip
    def traffic(run: Run) -> Counted:
        """What one layer sends, forward and backward, beside what the algorithm needs."""
        return _traffic(name, groups, what)

    return traffic


ring_calls, ring_bytes, ring_bytes_gqa = (_traffic_case("ring", *how) for how in ((N, 0), (N, 1), (2, 1)))
ring4_calls, ring4_bytes, ring4_bytes_gqa = (_traffic_case("ring4", *how) for how in ((N, 0), (N, 1), (2, 1)))
double_calls, double_bytes, double_bytes_gqa = (_traffic_case("double-ring4", *how) for how in ((N, 0), (N, 1), (2, 1)))
ulysses_calls, ulysses_bytes, ulysses_bytes_gqa = (_traffic_case("ulysses", *how) for how in ((N, 0), (N, 1), (2, 1)))
hybrid_calls, hybrid_bytes, hybrid_bytes_gqa = (_traffic_case("hybrid4", *how) for how in ((N, 0), (N, 1), (2, 1)))
gather_calls, gather_bytes, gather_bytes_gqa = (_traffic_case("gather", *how) for how in ((N, 0), (N, 1), (2, 1)))
ulysses4_calls, ulysses4_bytes, ulysses4_bytes_gqa = (_traffic_case("ulysses4", *how) for how in ((N, 0), (N, 1), (2, 1)))
gather4_calls, gather4_bytes, gather4_bytes_gqa = (_traffic_case("gather4", *how) for how in ((N, 0), (N, 1), (2, 1)))
ring8_calls, ring8_bytes, ring8_bytes_gqa = (_traffic_case("ring8", *how) for how in ((N, 0), (N, 1), (2, 1)))
double8_calls, double8_bytes, double8_bytes_gqa = (_traffic_case("double-ring8", *how) for how in ((N, 0), (N, 1), (2, 1)))
ulysses8_calls, ulysses8_bytes, ulysses8_bytes_gqa = (_traffic_case("ulysses8", *how) for how in ((N, 0), (N, 1), (2, 1)))
hybrid8_calls, hybrid8_bytes, hybrid8_bytes_gqa = (_traffic_case("hybrid8", *how) for how in ((N, 0), (N, 1), (2, 1)))
gather8_calls, gather8_bytes, gather8_bytes_gqa = (_traffic_case("gather8", *how) for how in ((N, 0), (N, 1), (2, 1)))


# ---- what computing hides ------------------------------------------------------------------------------------------------

KERNELS = ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention_for_cpu_backward")


def _exposed_on_rank(world: Any, plan: ContextPlan, backward: bool) -> int:
    """Messages between whose start and end no tile is computed; heads are exchanged outside of the count."""
    from mindspeed.testing import EventLog

    layout, groups = plan.layout(S), groups_of(plan, world)
    q, k, v, grad = share(whole_inputs(S, N, N, D, torch.float32), layout, world.rank)
    function = attention(plan, groups, layout, D)
    log = EventLog()
    if backward:
        out = function(q, k, v)
        with log.watching(compute=KERNELS):
            torch.autograd.grad(out, (q, k, v), grad)
    else:
        with log.watching(compute=KERNELS):
            function(q, k, v)
    groups.drop()
    return sum(name.startswith(("send", "recv")) for name in log.exposed())


def _hidden_case(name: str, backward: bool) -> Callable[[Run], Counted]:
    direction = "backward" if backward else "forward"

    @case(
        f"cp.hidden.{name}.{direction}", feature="context-parallel", metric="value", better="lower", must=2 if backward else 0,
        aim=0, unit="messages", preset="smoke" if name == "ring" else "standard",
    )  # fmt: skip
    def hidden(run: Run) -> Counted:
        """Messages that no tile hides; a transfer is a message sent and one received."""
        plan = PLANS[name]
        return Counted(
            ours=max(pools().get(plan.size).run(_exposed_on_rank, plan, backward)),
            check=Check(max(pools().get(plan.size).run(error_on_rank, plan, (S, N, N, D), torch.float32)), 1e-5),
            workload={"ranks": plan.size, "seq": S},
        )

    return hidden


ring_forward, ring_backward = (_hidden_case("ring", backward) for backward in (False, True))
double_forward, double_backward = (_hidden_case("double-ring4", backward) for backward in (False, True))
hybrid_forward, hybrid_backward = (_hidden_case("hybrid4", backward) for backward in (False, True))


# ---- balance, memory, error ----------------------------------------------------------------------------------------------


def _balance(layout: SequenceLayout) -> Counted:
    """Largest share of visible scores beside the mean."""
    ranks = range(layout.ring)
    shares = [sum(visible_entries(layout.tiles(rank, other)) for other in ranks) for rank in ranks]
    bounds = layout.boundaries[0] if layout.boundaries else (0, layout.length)
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    missing = abs(sum(shares) - sum(n * (n + 1) // 2 for n in lengths))
    return Counted(
        ours=max(shares), floor=sum(shares) / len(shares), check=Check(missing, 0, "visible scores that no rank computes"),
        workload={"ranks": layout.ring, "seq": layout.length, "documents": len(lengths), "placement": layout.placement},
    )  # fmt: skip


@case("cp.balance.causal", feature="context-parallel", metric="fraction", must=1 / 1.001, unit="scores", preset="smoke")
def balance_causal(run: Run) -> Counted:
    """Mean share of visible scores beside the largest, causal, 8 ranks."""
    return _balance(ContextPlan(RING, 8).layout(4096))


@case("cp.balance.documents", feature="reset-attention-mask", metric="fraction", must=1 / 1.1, unit="scores", preset="smoke")
def balance_documents(run: Run) -> Counted:
    """The same with documents of 256 to 1024 tokens, 4 ranks."""
    bounds = (0, 640, 1664, 1920, 2688, 3200, 4096)
    return _balance(ContextPlan(RING, 4).layout(4096, boundaries=(bounds,), restart_positions=True))


def _saved_on_rank(world: Any, plan: ContextPlan) -> int:
    from mindspeed.testing import saved_bytes

    layout, groups = plan.layout(S), groups_of(plan, world)
    inputs = share(whole_inputs(S, N, N, D, torch.bfloat16), layout, world.rank)
    with saved_bytes() as kept:
        out = attention(plan, groups, layout, D)(*inputs[:3])
    found = kept.bytes
    del out
    groups.drop()
    return found


def _memory(name: str) -> Counted:
    plan = PLANS[name]
    (alone,) = pools().get(1).run(_saved_on_rank, ContextPlan())
    kept = pools().get(plan.size).run(_saved_on_rank, plan)
    error = max(pools().get(plan.size).run(error_on_rank, plan, (S, N, N, D), torch.float32))
    workload = {"ranks": plan.size, "seq": S, "heads": N, "head size": D, "dtype": "bf16"}
    return Counted(ours=max(kept), floor=alone / plan.size, check=Check(error, 1e-5), workload=workload)


def _memory_case(name: str) -> Callable[[Run], Counted]:
    @case(
        f"cp.memory.{name}", feature="context-parallel", metric="fraction", better="equal", must=1.0, unit="bytes",
        preset="smoke" if name in ("ring", "ulysses") else "standard",
    )  # fmt: skip
    def memory(run: Run) -> Counted:
        """Bytes that a rank keeps for backward beside its share of what one device keeps."""
        return _memory(name)

    return memory


ring_memory, ring4_memory, ulysses_memory = (_memory_case(name) for name in ("ring", "ring4", "ulysses"))


def _ring_in_one_process(tensors: list[torch.Tensor], ring: int) -> list[torch.Tensor]:
    """The arithmetic of a ring of `ring` ranks, without ranks: output and gradients over the whole sequence."""
    layout = ContextPlan(RING, ring).layout(tensors[0].shape[0])
    options = AttentionOptions(tensors[0].shape[-1] ** -0.5)
    whole = [tensor.permute(1, 2, 0, 3) for tensor in tensors]
    index = [layout.index(rank) for rank in range(ring)]
    results = [torch.empty(tensor.shape, dtype=torch.float32) for tensor in (whole[0], *whole[:3])]
    for result in results[2:]:
        result.zero_()
    for rank in range(ring):
        q, grad = (whole[place][:, :, index[rank]] for place in (0, 3))
        blocks = [(rank - step) % ring for step in range(ring)]
        work = {block: plan_work(layout, rank, block, 1, options) for block in blocks}
        keys = {block: [whole[place][:, :, index[block]] for place in (1, 2)] for block in blocks}
        total = Accumulator(q, q.shape[-1])
        states = {block: forward_block(q, *keys[block], work[block], total) for block in blocks}
        out, dq = total.out.to(q.dtype), GradientSum(q)
        for block in reversed(blocks):
            parts = backward_block((grad, q, out, total.lse), *keys[block], work[block], states[block], dq)
            for result, part in zip(results[2:], parts, strict=True):
                result[:, :, index[block]] += part.total
        results[0][:, :, index[rank]], results[1][:, :, index[rank]] = out.float(), dq.total
    return [result.to(q.dtype).permute(2, 0, 1, 3) for result in results]


@case("cp.error", feature="context-parallel", metric="value", better="lower", must=1.3, aim=1.1, unit="times", preset="smoke")
def error(run: Run) -> Counted:
    """Largest bf16 error of rings of 2, 4 and 8 against fp64, beside the error of the kernel on the whole sequence."""
    tensors = whole_inputs(2048, 2, 2, 64, torch.bfloat16)
    plan = ContextPlan()

    def alone(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors[:3]]
        return both_ways(attention(plan, ContextGroups(), plan.layout(2048), 64), *leaves, tensors[3].to(dtype))

    truth, single = (
        alone(torch.float64),
        [relative(a, b) for a, b in zip(alone(torch.bfloat16), alone(torch.float64), strict=True)],
    )
    growth = {}
    for ring in (2, 4, 8):
        ours = [relative(a, b) for a, b in zip(_ring_in_one_process(tensors, ring), truth, strict=True)]
        growth[f"ring {ring}"] = max(a / b for a, b in zip(ours, single, strict=True))
    return Counted(
        ours=max(growth.values()), check=Check(max(single), 1e-2, "error of the kernel itself"),
        workload={"seq": 2048, "head size": 64, "dtype": "bf16"} | {name: round(value, 3) for name, value in growth.items()},
    )  # fmt: skip
