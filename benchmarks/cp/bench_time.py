"""Costs of context-parallel attention over ranks beside one process, and beside other software on the same kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks._case import Check, Paired, Run, Skip, case
from benchmarks._ranks import cost, cost_here
from benchmarks.cp._setup import attention, both_ways, error_on_rank, groups_of, relative, share, whole_inputs
from benchmarks.peers.context_parallel import PEERS, version
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import take
from mindspeed.core.context_parallel.plan import RING, ULYSSES, ContextPlan
from mindspeed.testing.pool import RankFailure, pools

S, N, D = 4096, 8, 64
SIZES = (S, N, N, D)


def _cost_on_rank(world: Any, plan: ContextPlan, clock: str) -> float:
    """Forward and backward of one layer."""
    layout, groups = plan.layout(S), groups_of(plan, world)
    inputs = share(whole_inputs(*SIZES, torch.bfloat16), layout, world.rank)
    layer = attention(plan, groups, layout, D)
    spent = cost_here(world, lambda: both_ways(layer, *inputs), clock=clock)
    groups.drop()
    return spent


def _peer_cost_on_rank(world: Any, name: str, clock: str) -> float:
    _, make, zigzag = PEERS[name]
    layout = ContextPlan(RING if zigzag else ULYSSES, world.size).layout(S)
    inputs = share(whole_inputs(*SIZES, torch.bfloat16), layout, world.rank)
    layer = make(world.group)
    return cost_here(world, lambda: both_ways(layer, *inputs), clock=clock)


def _peer_error_on_rank(world: Any, name: str) -> float:
    """Largest relative error at a smaller size, in bf16."""
    _, make, zigzag = PEERS[name]
    whole = whole_inputs(256, N, N, D, torch.bfloat16)
    alone, layout = ContextPlan(), ContextPlan(RING if zigzag else ULYSSES, world.size).layout(256)
    leaves = [tensor.float().requires_grad_() for tensor in whole[:-1]]
    truth = both_ways(attention(alone, ContextGroups(), alone.layout(256), D), *leaves, whole[-1].float())
    ours = both_ways(make(world.group), *share(whole, layout, world.rank))
    index = layout.index(world.rank)
    return max(relative(mine, take(true, index, 0)) for mine, true in zip(ours, truth, strict=True))


def _usable_peers(run: Run, ranks: int) -> tuple[list[str], dict[str, str]]:
    """Peers to measure, and why the others are not."""
    usable, status = [], {}
    for name in PEERS:
        if not run.wants_peer(name):
            continue
        if version(name) is None:
            status[name] = "not installed"
            continue
        try:
            error = max(pools().get(ranks).run(_peer_error_on_rank, name))
        except RankFailure as failure:
            status[name] = f"peer failed: {str(failure).strip().splitlines()[-1]}"[:200]
        else:
            usable.append(name) if error <= 2e-2 else status.setdefault(name, "peer wrong")
    return usable, status


def _rounds(plan: ContextPlan, run: Run, clock: str, baseline: str) -> Paired:
    ranks = plan.size
    usable, status = _usable_peers(run, ranks)

    def round_() -> Mapping[str, float]:
        alone = cost(1, _cost_on_rank, ContextPlan(), clock, clock=clock)
        costs = {name: cost(ranks, _peer_cost_on_rank, name, clock, clock=clock) for name in usable}
        ours = cost(ranks, _cost_on_rank, plan, clock, clock=clock)
        return {"ours": ours, baseline: alone if clock == "cpu" else alone / ranks, **costs}

    error = max(pools().get(ranks).run(error_on_rank, plan, (256, N, N, D), torch.bfloat16))
    return Paired(
        round=round_,
        check=Check(error, 2e-2, "relative error of output and gradients in bf16"),
        workload={"ranks": ranks, "batch": 1, "seq": S, "heads": N, "head size": D, "dtype": "bf16", "mask": "causal"},
        versions={name: version(name) or "" for name in usable},
        status=status,
    )


Rounds = Callable[[Run], Paired]


def _cpu(name: str, must: float, aim: float, preset: str = "standard") -> Callable[[Rounds], Rounds]:
    return case(
        f"cp.eff.{name}", feature="context-parallel", metric="ratio", against="one process", must=must, aim=aim, preset=preset
    )


@_cpu("ring", 0.86, 0.92, "smoke")
def ring_efficiency(run: Run) -> Paired:
    """CPU seconds of one process beside those of two ranks, balanced ring."""
    return _rounds(ContextPlan(RING, 2), run, "cpu", "one process")


@_cpu("ulysses", 0.93, 0.97)
def ulysses_efficiency(run: Run) -> Paired:
    """The same with Ulysses."""
    return _rounds(ContextPlan(ULYSSES, 2), run, "cpu", "one process")


@_cpu("ring4", 0.86, 0.92, "full")
def ring4_efficiency(run: Run) -> Paired:
    """CPU seconds of one process beside those of four ranks, balanced ring."""
    return _rounds(ContextPlan(RING, 4), run, "cpu", "one process")


@_cpu("ulysses4", 0.93, 0.97, "full")
def ulysses4_efficiency(run: Run) -> Paired:
    """The same with Ulysses."""
    return _rounds(ContextPlan(ULYSSES, 4), run, "cpu", "one process")


def _wall(name: str, must: float, preset: str = "standard") -> Callable[[Rounds], Rounds]:
    return case(
        f"cp.wall.{name}", feature="context-parallel", metric="ratio", against="ideal", must=must, unit="wall ms", preset=preset
    )


@_wall("ring", 0.77)
def ring_wall(run: Run) -> Paired:
    """Half the wall time of one process beside that of two ranks, balanced ring."""
    return _rounds(ContextPlan(RING, 2), run, "wall", "ideal")


@_wall("ulysses", 0.85)
def ulysses_wall(run: Run) -> Paired:
    """The same with Ulysses."""
    return _rounds(ContextPlan(ULYSSES, 2), run, "wall", "ideal")


def _with_cores(plan: ContextPlan, run: Run) -> Paired:
    """Wall times mean nothing where ranks take turns on a core."""
    cores = len(os.sched_getaffinity(0))
    if cores < plan.size:
        raise Skip(f"needs {plan.size} cores, has {cores}")
    return _rounds(plan, run, "wall", "ideal")


@_wall("ring4", 0.77, "full")
def ring4_wall(run: Run) -> Paired:
    """A quarter of the wall time of one process beside that of four ranks, balanced ring."""
    return _with_cores(ContextPlan(RING, 4), run)


@_wall("ulysses4", 0.85, "full")
def ulysses4_wall(run: Run) -> Paired:
    """The same with Ulysses."""
    return _with_cores(ContextPlan(ULYSSES, 4), run)
