"""Remapping finds structure, schedules keep their promises, and adaptive attention equals dense attention."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed.core.attention import FULL, Scoring
from mindspeed.core.context_parallel.adaptive.adaptive_attention import AdaptivePlan, adaptive_attention
from mindspeed.core.context_parallel.adaptive.remap import best_order, remapped_order, tile_grid
from mindspeed.core.context_parallel.adaptive.schedule import BUDGET, message_units, schedule_tiles
from mindspeed.core.context_parallel.exchange import Mailbox
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.work import MaskBias, Work
from mindspeed.testing import ranks
from tests.core.context_parallel.dense import assert_near, dense, draw


def grids(ranks_):
    place = torch.arange(ranks_)
    distance = place[:, None] - place[None, :]
    return {
        "causal": distance >= 0,
        "below": (distance == 0) | (distance == 1),
        "band": distance.abs() <= 1,
        "full": distance >= -ranks_,
    }


@pytest.mark.parametrize(
    ("ranks_", "name", "most"),
    [
        (4, "causal", 3),
        (4, "below", 2),
        (4, "band", 3),
        (4, "full", 4),
        (8, "causal", 6),
        (8, "below", 2),
        (8, "band", 3),
        (8, "full", 8),
    ],
)
def test_schedules_are_as_short_as_the_reference(ranks_, name, most):
    assert len(schedule_tiles(grids(ranks_)[name].tolist())) <= most


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_schedules_keep_their_promises(data):
    ranks_ = data.draw(st.integers(1, 8))
    grid = data.draw(st.lists(st.lists(st.booleans(), min_size=ranks_, max_size=ranks_), min_size=ranks_, max_size=ranks_))
    rounds = schedule_tiles(grid)
    computed = [(task.row, task.column) for tasks in rounds for task in tasks]
    assert sorted(computed) == sorted((r, c) for r, c in itertools.product(range(ranks_), repeat=2) if grid[r][c])
    for tasks in rounds:
        assert tasks and len({task.device for task in tasks}) == len(tasks)
        assert all(task.device in (task.row, task.column) for task in tasks)
        assert all(task.device == task.row for task in tasks if task.row == task.column)
    assert all(units <= BUDGET for units in message_units(rounds).values())


def interleaved(length):
    """Two causal streams whose tokens alternate."""
    place = torch.arange(length)
    return (place[:, None] >= place[None, :]) & (place[:, None] % 2 == place[None, :] % 2)


@pytest.mark.parametrize(("ranks_", "before", "after"), [(4, 10, 6), (8, 36, 20)])
def test_interleaved_streams_are_told_apart(ranks_, before, after):
    visible = interleaved(64)
    identity = torch.arange(64)
    order = best_order(visible, ranks_)
    assert int(tile_grid(visible, identity, ranks_).sum()) == before
    assert int(tile_grid(visible, order, ranks_).sum()) <= after
    assert sorted(order.tolist()) == identity.tolist()


def test_nothing_to_gain_keeps_the_order():
    visible = torch.ones(32, 32, dtype=torch.bool).tril()
    assert torch.equal(best_order(visible, 4), torch.arange(32))
    assert torch.equal(remapped_order(visible, 4), torch.arange(32))


def test_coarse_cells_move_whole_and_repeat():
    visible = interleaved(8).repeat_interleave(1024, 0).repeat_interleave(1024, 1)
    begun = time.process_time()
    order = remapped_order(visible, 4)
    assert time.process_time() - begun < 5
    assert torch.equal(order, remapped_order(visible, 4))
    assert torch.equal(order.view(-1, 1024).diff(dim=1), torch.ones(8, 1023, dtype=torch.int64))
    assert int(tile_grid(visible, order, 4).sum()) <= 6


S = 32
GENERATOR = torch.Generator().manual_seed(0)
PLACE = torch.arange(S)
DIFFERENCE = PLACE[:, None] - PLACE[None, :]
MASKS = {
    "causal": DIFFERENCE >= 0,
    "window": (DIFFERENCE >= 0) & (DIFFERENCE < 6),
    "blocks": (PLACE[:, None] // 11 == PLACE[None, :] // 11),
    "streams": interleaved(S),
    "random": torch.rand(S, S, generator=GENERATOR) < 0.7,
    "blind rows": (DIFFERENCE >= 0) & (PLACE[:, None] % 5 != 0),
    "empty diagonal": DIFFERENCE >= S // 2,
}


def attention_on(world, visible, order):
    share = S // world.size
    blocks = order.view(world.size, share)
    grid = tile_grid(visible, order, world.size)

    def work_of(task):
        hidden = ~visible[blocks[task.row]][:, blocks[task.column]]
        bias = MaskBias(hidden) if hidden.any() else None
        return (Work(slice(0, 2), slice(0, share), slice(0, share), Scoring(0.3, FULL, bias)),)

    plan = AdaptivePlan(schedule_tiles(grid.tolist()), world.rank, world.size, Mailbox(world.group), work_of)
    return blocks[world.rank], lambda q, k, v: adaptive_attention(q, k, v, plan)


def check(world, name, dtype=torch.float32):
    visible = MASKS[name]
    for order in (torch.arange(S), best_order(visible, world.size)):
        mine, attention = attention_on(world, visible, order)
        tensors = draw(S, dtype=dtype)
        layout = SequenceLayout(S, custom_mask=~visible)
        truth = dense(*tensors, layout, 0.3)
        q, k, v, grad_out = (tensor[:, :, mine].clone().requires_grad_() for tensor in tensors)
        out = attention(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
        for ours, true in zip((out.detach(), *gradients), truth, strict=True):
            assert_near(ours, true[:, :, mine], dtype)


@ranks(4)
@pytest.mark.parametrize("name", MASKS)
def test_four_devices_equal_dense(world, name):
    check(world, name)


@ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_devices_equal_dense(world, dtype):
    for name in MASKS:
        check(world, name, dtype)
