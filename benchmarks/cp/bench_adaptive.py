"""Adaptive context parallelism: how evenly tiles lie over devices, and what is sent, beside what the schedule needs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from benchmarks._case import Check, Counted, Run, case
from benchmarks.cp._setup import attention, both_ways, groups_of, relative, share, whole_inputs
from mindspeed.core.context_parallel.adaptive.planner import AdaptivePlanner
from mindspeed.core.context_parallel.adaptive.remap import remapped_order, tile_grid
from mindspeed.core.context_parallel.adaptive.schedule import Round, schedule_tiles
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import take
from mindspeed.core.context_parallel.plan import ADAPTIVE, ContextPlan
from mindspeed.testing.pool import pools

S, N, D = 256, 8, 16
DEVICES = 8


def visible_pairs(name: str, length: int) -> Tensor:
    """Boolean [S, S] masks of the cases, True where visible."""
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]
    return {
        "causal": distance >= 0,
        "window": (distance >= 0) & (distance < length // 16),
        "streams": (distance >= 0) & (distance % 2 == 0),
    }[name]


def _scheduled(visible: Tensor, ranks: int) -> tuple[tuple[Round, ...], Tensor, int]:
    """The schedule, visible scores by tile [R, R], and how many tiles are missing or computed twice."""
    order = remapped_order(visible, ranks, coarse=False)
    grid = tile_grid(visible, order, ranks)
    rounds = schedule_tiles(grid.tolist())
    side = visible.shape[0] // ranks
    computed = Counter((task.row, task.column) for tasks in rounds for task in tasks)
    wrong = sum(abs(computed[row, column] - int(grid[row, column])) for row in range(ranks) for column in range(ranks))
    return rounds, visible[order][:, order].view(ranks, side, ranks, side).sum((1, 3)), wrong


def _balance(name: str, tiles: bool) -> Counted:
    visible = visible_pairs(name, 1024)
    rounds, scores, wrong = _scheduled(visible, DEVICES)
    load = [0] * DEVICES
    for task in (task for tasks in rounds for task in tasks):
        load[task.device] += 1 if tiles else int(scores[task.row, task.column])
    return Counted(
        ours=max(load), floor=math.ceil(sum(load) / DEVICES) if tiles else sum(load) / DEVICES,
        check=Check(wrong, 0, "tiles missing or computed twice"),
        workload={"ranks": DEVICES, "seq": 1024, "mask": name, "rounds": len(rounds), "tiles": int((scores > 0).sum())},
    )  # fmt: skip


@case(
    "cp.balance.adaptive.window", feature="adaptive-context-parallel", metric="fraction", must=1 / 1.1, unit="scores",
    preset="smoke",
)  # fmt: skip
def balance_window(run: Run) -> Counted:
    """Mean share of visible scores beside the largest, sliding window of S / 16 on 8 devices."""
    return _balance("window", tiles=False)


@case(
    "cp.balance.adaptive.causal", feature="adaptive-context-parallel", metric="fraction", must=1 / 1.1, unit="tiles",
    preset="smoke",
)  # fmt: skip
def balance_causal(run: Run) -> Counted:
    """Least possible number of tiles on the busiest of 8 devices beside ours; a tile is computed whole, whatever it shows."""
    return _balance("causal", tiles=True)


@case(
    "cp.balance.adaptive.streams", feature="adaptive-context-parallel", metric="fraction", must=1 / 1.1, unit="tiles",
    preset="smoke",
)  # fmt: skip
def balance_streams(run: Run) -> Counted:
    """The same with two interleaved causal streams, which are told apart first: 20 tiles of 36 are left."""
    return _balance("streams", tiles=True)


def least_bytes(rounds: tuple[Round, ...], ranks: int, heads: int) -> int:
    """Bytes that the busiest device sends, forward and backward of one layer in fp32."""
    side = S // ranks
    keys, queries, statistics = 2 * side * heads * D, side * N * D, side * N
    sent = [0] * ranks
    for task in (task for tasks in rounds for task in tasks):
        if task.kind == "fetch":
            sent[task.column] += 2 * keys  # forward and backward
            sent[task.device] += keys  # their gradient
        elif task.kind == "help":
            sent[task.row] += queries + 3 * queries + statistics  # q; q, out, its gradient and the log-sum-exp
            sent[task.device] += queries + statistics + queries  # out and log-sum-exp; the gradient of q
    return 4 * max(sent)


def _bytes_on_rank(world: Any, mask: str, heads: int) -> tuple[int, int, float]:
    """What this rank sends, what the schedule needs on the busiest one, and the largest relative error."""
    from mindspeed.testing import count_communication

    plan = ContextPlan(ADAPTIVE, world.size)
    groups = groups_of(plan, world)
    layout = AdaptivePlanner(groups).remapped(plan.layout(S, custom_mask=~visible_pairs(mask, S)))
    whole = whole_inputs(S, N, heads, D, torch.float32)
    inputs, layer = share(whole, layout, world.rank), attention(plan, groups, layout, D)
    ours = both_ways(layer, *inputs)
    with count_communication() as counted:
        both_ways(layer, *inputs)
    groups.drop()
    alone = ContextPlan()
    single = attention(alone, ContextGroups(), alone.layout(S, custom_mask=layout.custom_mask), D)
    truth = both_ways(single, *[tensor.requires_grad_() for tensor in whole[:-1]], whole[-1])
    error = max(relative(a, take(b, layout.index(world.rank), 0)) for a, b in zip(ours, truth, strict=True))
    return counted.bytes("send"), least_bytes(layout.rounds, world.size, heads), error


def _traffic(mask: str, heads: int, ranks: int = 4) -> Counted:
    found = pools().get(ranks).run(_bytes_on_rank, mask, heads)
    return Counted(
        ours=max(sent for sent, _, _ in found), floor=found[0][1], check=Check(max(error for *_, error in found), 1e-5),
        workload={"ranks": ranks, "seq": S, "heads": N, "key heads": heads, "head size": D, "dtype": "fp32", "mask": mask},
    )  # fmt: skip


@case(
    "cp.bytes.adaptive4.mha", feature="adaptive-context-parallel", metric="fraction", better="equal", must=1.0, unit="bytes",
)  # fmt: skip
def bytes_causal(run: Run) -> Counted:
    """What one layer sends on the busiest rank, causal, beside what its schedule needs."""
    return _traffic("causal", N)


@case(
    "cp.bytes.adaptive4.gqa", feature="adaptive-context-parallel", metric="fraction", better="equal", must=1.0, unit="bytes",
)  # fmt: skip
def bytes_streams(run: Run) -> Counted:
    """The same with two interleaved streams and 2 key heads."""
    return _traffic("streams", 2)
