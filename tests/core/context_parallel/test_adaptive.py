"""Remapping finds structure, schedules keep their promises, and adaptive attention equals dense attention."""

import argparse
import itertools
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed.core.attention import FULL, Scoring, dispatch
from mindspeed.core.context_parallel.adaptive.adaptive_attention import AdaptivePlan, adaptive_attention
from mindspeed.core.context_parallel.adaptive.feature import AdaptiveContextParallel, AdaptiveFlags
from mindspeed.core.context_parallel.adaptive.planner import AdaptivePlanner
from mindspeed.core.context_parallel.adaptive.remap import best_order, remapped_order, tile_grid
from mindspeed.core.context_parallel.adaptive.schedule import BUDGET, message_units, owners_of_tiles, schedule_tiles
from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.exchange import Mailbox
from mindspeed.core.context_parallel.gathered_attention import heads_first, sequence_first
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.plan import ContextPlan
from mindspeed.core.context_parallel.utils import (
    USER,
    set_adaptive_cp_grid_mask_by_user,
    set_adaptive_cp_mask_list_by_user,
)
from mindspeed.core.context_parallel.work import AttentionOptions, MaskBias, Work
from mindspeed.core.transformer.flash_attention.feature import FlashFlags
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import set_attention_mask
from mindspeed.patching import RunShape
from mindspeed.testing import count_communication, ranks
from mindspeed.testing.parity import assert_same_training
from tests.core.context_parallel.dense import assert_near, assert_parity, dense, draw
from tests.core.transformer.attention_of_a_run import layer, run_of
from tests.training.runs import TINY, assert_same_digits, seed_checkpoint, train


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
        (8, "causal", 5),
        (8, "below", 2),
        (8, "band", 3),
        (8, "full", 8),
        (16, "causal", 9),
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


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**16 - 1))
def test_no_other_sharing_of_tiles_has_a_less_busy_device(bits):
    grid = [[bool(bits >> (4 * row + column) & 1) for column in range(4)] for row in range(4)]
    owners = owners_of_tiles(grid)
    busiest = max(Counter(owners.values()).values(), default=0)
    for devices in range(1, 16):  # what lies between some devices must be computed by them
        inside = [device for device in range(4) if devices >> device & 1]
        tiles = sum(grid[row][column] for row in inside for column in inside)
        if tiles > (busiest - 1) * len(inside):
            return
    assert busiest == 0


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


def attention_on(world, visible, order, gradient_dtype=None):
    share = S // world.size
    blocks = order.view(world.size, share)
    grid = tile_grid(visible, order, world.size)

    def work_of(task):
        hidden = ~visible[blocks[task.row]][:, blocks[task.column]]
        bias = MaskBias(hidden) if hidden.any() else None
        return (Work(slice(0, 2), slice(0, share), slice(0, share), Scoring(0.3, FULL, bias)),)

    plan = AdaptivePlan(schedule_tiles(grid.tolist()), world.rank, world.size, Mailbox(world.group), work_of, gradient_dtype)
    return blocks[world.rank], lambda q, k, v: adaptive_attention(q, k, v, plan)


def check(world, name, dtype=torch.float32, gradient_dtype=None):
    visible = MASKS[name]
    for order in (torch.arange(S), best_order(visible, world.size)):
        mine, attention = attention_on(world, visible, order, gradient_dtype)
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


@ranks(2)
def test_gradients_of_keys_may_travel_in_bf16(world):
    visible, order = MASKS["causal"], torch.arange(S)
    sent = {}
    for gradient_dtype in (None, torch.bfloat16):
        mine, attention = attention_on(world, visible, order, gradient_dtype)
        q, k, v, grad_out = (tensor[:, :, mine].clone().requires_grad_() for tensor in draw(S, dtype=torch.bfloat16))
        out = attention(q, k, v)
        with count_communication() as counted:
            torch.autograd.grad(out, (q, k, v), grad_out)
        sent[gradient_dtype] = counted.bytes("send")
    fetched = [
        task.device for tasks in schedule_tiles(tile_grid(visible, order, 2).tolist()) for task in tasks if task.kind == "fetch"
    ]
    assert sent[None] - sent[torch.bfloat16] == fetched.count(world.rank) * 2 * (k.numel() + v.numel())
    check(world, "causal", torch.bfloat16, torch.bfloat16)


def problems(**changes):
    run = argparse.Namespace(
        **{"context_parallel_size": 4, "context_parallel_algo": "adaptive_cp_algo", "seq_length": 64, **changes}
    )
    flags = AdaptiveFlags(**{key: value for key, value in changes.items() if key.startswith("adaptive_")})
    return [str(problem) for problem in AdaptiveContextParallel().check(flags, RunShape(run, "cpu"))]


def test_flags_without_an_adaptive_algorithm_are_refused():
    assert problems() == []
    (message,) = problems(context_parallel_algo="ulysses_cp_algo", adaptive_cp_only_reschedule=True)
    assert "--adaptive-cp-only-reschedule" in message and "needs an adaptive algorithm" in message
    (message,) = problems(adaptive_cp_manually_set_mask_list=True, adaptive_cp_dynamic_attn_mask=True)
    assert "contradicts" in message


@ranks(4)
@pytest.mark.parametrize("algorithm", ["adaptive_cp_algo", "hybrid_adaptive_cp_algo"])
def test_through_the_one_call(world, algorithm):
    plan = ContextPlan(algorithm, 4, degree=2 if "hybrid" in algorithm else None)
    groups = ContextGroups()
    groups.create(plan, world.group, overlap=False)
    maker = LayoutMaker(plan, adaptive=AdaptivePlanner(groups))
    for mask in (None, ~MASKS["streams"], torch.rand(2, 1, S, S, generator=torch.Generator().manual_seed(5)) < 0.4):
        set_attention_mask(mask)
        layout = maker.layout(S)
        assert maker.layout(S) is layout, "planned once while the mask stays"

        def attention(q, k, v, layout=layout):
            inputs = [sequence_first(tensor) for tensor in (q, k, v)]
            options = AttentionOptions(0.3)
            return heads_first(context_attention(*inputs, plan=plan, groups=groups, layout=layout, options=options))

        assert_parity(attention, layout, world.rank)
    set_attention_mask(None)


@ranks(2)
def test_masks_by_hand(world):
    plan, groups = ContextPlan("adaptive_cp_algo", 2), ContextGroups()
    groups.create(plan, world.group, overlap=False)
    maker = LayoutMaker(plan, adaptive=AdaptivePlanner(groups, remap=False, manual=True))
    hidden = ~MASKS["causal"]
    half = S // 2

    def masks(order, schedule, rank, ranks_):
        tasks = [task for tasks in schedule for task in tasks if task.device == rank]
        blocks = [hidden[t.row * half : (t.row + 1) * half, t.column * half : (t.column + 1) * half] for t in tasks]
        return [block if block.any() else None for block in blocks]

    set_adaptive_cp_grid_mask_by_user([[True, False], [True, True]])
    set_adaptive_cp_mask_list_by_user(masks)
    layout = maker.layout(S)
    assert sum(len(tasks) for tasks in layout.rounds) == 3

    def attention(q, k, v):
        inputs = [sequence_first(tensor) for tensor in (q, k, v)]
        out = context_attention(*inputs, plan=plan, groups=groups, layout=layout, options=AttentionOptions(0.3))
        return heads_first(out)

    assert_parity(attention, layout, world.rank)
    set_adaptive_cp_mask_list_by_user([])
    with pytest.raises(ValueError, match=r"rank \d computes \d tiles, got 0 masks"):
        AdaptivePlanner(groups, remap=False, manual=True).remapped(plan.layout(S))
    set_adaptive_cp_grid_mask_by_user([[True]])
    with pytest.raises(ValueError, match="expected a grid of 2 x 2"):
        AdaptivePlanner(groups, remap=False, manual=True).remapped(plan.layout(S))
    USER.clear()


def test_training_with_an_adaptive_schedule():
    rope = "--position-embedding-type rope --group-query-attention --num-query-groups 2"
    flags = f"{rope} --context-parallel-size 2 --context-parallel-algo adaptive_cp_algo"
    assert_same_training(rope, flags, world_b=2, features=["adaptive-context-parallel"])


@ranks(4)
def test_a_kernel_runs_once_for_each_tile_that_shows_something(world):
    """Also where the mask is in host memory: the same numbers, and no more calls."""
    for name in ("streams", "window", "blind rows", "empty diagonal"):
        plan, groups = ContextPlan("adaptive_cp_algo", 4), ContextGroups()
        groups.create(plan, world.group, overlap=False)
        layout = AdaptivePlanner(groups).remapped(plan.layout(S, custom_mask=~MASKS[name]))
        calls, original = [], dispatch.choose
        dispatch.choose = lambda *args, calls=calls, original=original: calls.append(1) or original(*args)
        inputs = [torch.randn(S // 4, 2, 4, 8, requires_grad=True) for _ in range(3)]
        try:
            out = context_attention(*inputs, plan=plan, groups=groups, layout=layout, options=AttentionOptions(0.3))
            forward = len(calls)
            out.sum().backward()
        finally:
            dispatch.choose = original
        counts = world.gather(torch.tensor([[forward, len(calls) - forward]]), 0).sum(0).tolist()
        tiles = int(tile_grid(MASKS[name], layout.order, 4).sum())
        assert counts == [tiles, tiles]
        groups.drop()


def test_masks_that_change_in_place_are_planned_anew_when_dynamic():
    plan, hidden = ContextPlan("adaptive_cp_algo", 4), ~MASKS["causal"]
    fixed, dynamic = AdaptivePlanner(ContextGroups()), AdaptivePlanner(ContextGroups(), dynamic=True)
    layout = plan.layout(S, custom_mask=hidden)
    before = [planner.remapped(layout).order for planner in (fixed, dynamic)]
    hidden.copy_(~MASKS["streams"])
    after = [planner.remapped(layout).order for planner in (fixed, dynamic)]
    assert torch.equal(after[0], before[0])
    assert torch.equal(before[1], torch.arange(S)) and torch.equal(after[1], best_order(MASKS["streams"], 4))
    assert not torch.equal(after[1], torch.arange(S))


def test_what_a_plan_for_causal_layers_would_drop_is_refused():
    arguments = dict(context_parallel_algo="adaptive_cp_algo", context_parallel_size=2)
    inputs = [torch.randn(8, 1, 4, 4) for _ in range(3)]
    hidden = torch.rand(1, 1, 16, 16) < 0.5
    for mask_type in ("causal", "general"):
        run = run_of(**arguments, attention_mask_type=mask_type)
        with pytest.raises(ValueError, match="attention_mask: .*adaptive_cp_algo.* give it to set_attention_mask"):
            run.attention(layer(), *inputs, hidden)
    with pytest.raises(ValueError, match="--sparse-mode 1 needs a mask: call set_attention_mask"):
        run_of(FlashFlags(sparse_mode=1), **arguments).attention(layer(), *inputs, None)
    with pytest.raises(ValueError, match="a layer of type no_mask without one sees everything"):
        run_of(**arguments, attention_mask_type="general").attention(layer("no_mask"), *inputs, None)


@pytest.fixture(scope="module")
def streams_on_one_device(tmp_path_factory):
    """Training with two interleaved streams, of which an adaptive algorithm moves the tokens."""
    folder = tmp_path_factory.mktemp("streams")
    flags = f"{TINY} --position-embedding-type rope --use-flash-attn --attention-mask-type general"
    flags = f"{flags} {seed_checkpoint(folder / 'seed', flags)}"
    hidden = ~interleaved(32)
    plain = train(flags).curve
    set_attention_mask(hidden)
    curve = train(flags).curve
    set_attention_mask(None)
    assert curve != plain and not torch.equal(best_order(~hidden, 4), torch.arange(32))
    return flags, hidden, curve


@ranks(4, megatron=True)
@pytest.mark.parametrize("layout", ["", "--context-parallel-algo hybrid_adaptive_cp_algo --ulysses-degree-in-cp 2"])
def test_positions_follow_tokens_that_are_moved(world, layout, streams_on_one_device):
    """Rotary positions, labels and loss masks too: the curve of one device, also when layers are computed again."""
    flags, hidden, expected = streams_on_one_device
    set_attention_mask(hidden)
    try:
        recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        curve = train(
            f"{flags} --context-parallel-size 4 {layout or '--context-parallel-algo adaptive_cp_algo'} {recompute}"
        ).curve
    finally:
        set_attention_mask(None)
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)
