"""Ring attention equals dense attention for every ring, window, cache, mask and head sharing; messages are counted."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed.core.attention import dispatch
from mindspeed.core.context_parallel.exchange import Exchange
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.ring_attention import RingContext, RingRoute, ring_attention
from mindspeed.core.context_parallel.work import AlibiBias, AttentionOptions
from mindspeed.testing import count_communication, ranks, saved_bytes
from tests.core.context_parallel.dense import assert_parity, draw, shares

S = 64
DOCUMENTS = ((0, 5, 29, 64), (0, 64))
LAYOUTS = {
    "causal": {},
    "full": {"future": None, "placement": "contiguous"},
    "band": {"past": 9},
    "documents": {"boundaries": DOCUMENTS},
    "documents-balanced": {"boundaries": DOCUMENTS, "placement": "document_zigzag"},
}


def context_for(world, layout, *, options=None, window=1, cache="none", fused_update=False):
    options = options or AttentionOptions(0.3)
    return RingContext(
        Exchange(world.group), world.rank, layout, options, window=window, cache=cache, fused_update=fused_update
    )


def blocks(route):
    return [step.block for step in route.steps()]


def test_block_orders():
    assert blocks(RingRoute(0, 4)) == [0, 3, 2, 1]
    assert blocks(RingRoute(0, 4, direction=-1)) == [1, 2, 3, 0]
    assert blocks(RingRoute(0, 4, window=2)) == [0, 1, 2, 3]
    assert blocks(RingRoute(1, 4, window=2)) == [1, 0, 3, 2]


@pytest.mark.parametrize(("ranks_", "window"), [(4, 1), (4, 2), (8, 2), (8, 4), (6, 3), (3, 1)])
@pytest.mark.parametrize("direction", [1, -1])
def test_buffers_and_gradients_are_where_the_next_step_needs_them(ranks_, window, direction):
    routes = [RingRoute(rank, ranks_, window, direction) for rank in range(ranks_)]
    steps = [list(route.steps()) for route in routes]
    for rank, route in enumerate(routes):
        visited = [step.block for step in steps[rank]]
        assert sorted(visited) == list(range(ranks_))
        assert visited[0 if direction == 1 else -1] == rank
        window_start = visited[0]
        for index, step in enumerate(steps[rank][:-1]):
            following = visited[index + 1]
            if index % window == 0:
                window_start_of_sender = steps[route.outer_from][index].block
            if step.send_inner:
                assert steps[route.inner_from][index].block == following and routes[route.inner_from].inner_to == rank
            else:
                assert step.take_outer and window_start_of_sender == following
                assert steps[route.gradient_from][index].block == following
                assert routes[route.outer_from].outer_to == rank and routes[route.gradient_from].gradient_to == rank
        assert window_start == visited[0]


@ranks(2)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_ranks_equal_dense(world, name, dtype):
    layout = SequenceLayout(S, ring=2, **LAYOUTS[name])
    for cache in ("none", "full", "half"):
        context = context_for(world, layout, cache=cache)
        assert_parity(lambda q, k, v, context=context: ring_attention(q, k, v, context), layout, world.rank, dtype=dtype)


@ranks(4)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2])
def test_four_ranks_equal_dense(world, name, window):
    layout = SequenceLayout(S, ring=4, **LAYOUTS[name])
    for groups in (4, 2, 1):
        context = context_for(world, layout, window=window, cache="half" if groups == 2 else "none")
        assert_parity(lambda q, k, v, context=context: ring_attention(q, k, v, context), layout, world.rank, groups=groups)


class Updates(TorchDispatchMode):
    """Dtypes of the results that `ring_attention_update` was given."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mindspeed.ring_attention_update.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_update_equals_dense_and_is_used(world, name, dtype):
    layout = SequenceLayout(S, ring=4, **LAYOUTS[name])
    plain, fused = context_for(world, layout), context_for(world, layout, fused_update=True)
    assert_parity(lambda q, k, v: ring_attention(q, k, v, fused), layout, world.rank, dtype=dtype)
    inputs = shares(draw(S, dtype=dtype), layout, world.rank)[:3]
    with Updates() as updates:
        torch.testing.assert_close(ring_attention(*inputs, fused), ring_attention(*inputs, plain))
    assert set(updates.dtypes) == {torch.float32}  # merging in the dtype of activations would add an error per step
    if name == "causal":
        assert len(updates.dtypes) == 3  # one for each block but the first


@ranks(2)
def test_odd_shares_values_of_another_size_and_one_sample(world):
    layout = SequenceLayout(44, ring=2)
    context = context_for(world, layout)
    assert_parity(lambda q, k, v: ring_attention(q, k, v, context), layout, world.rank, value_dim=4, batch=1)


@ranks(2)
@pytest.mark.parametrize("mask", ["random", "prefix", "blind-rows"])
def test_custom_masks(world, mask):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    if mask == "random":
        hidden = torch.rand(2, 1, S, S, generator=generator) < 0.3
    elif mask == "prefix":
        hidden[:, :20] = False
    else:
        hidden[7], hidden[50] = True, True
    layout = SequenceLayout(S, ring=2, placement="contiguous", custom_mask=hidden)
    context = context_for(world, layout)
    assert_parity(lambda q, k, v: ring_attention(q, k, v, context), layout, world.rank)


@ranks(4)
@pytest.mark.parametrize("distance", ["absolute", "root", "signed"])
def test_alibi_distances_are_global(world, distance):
    layout = SequenceLayout(S, ring=4, boundaries=DOCUMENTS)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    context = context_for(world, layout, options=AttentionOptions(0.3, slopes=slopes, distance=distance), window=2)
    bias = AlibiBias(slopes, torch.arange(S), torch.arange(S), distance)(range(S), range(S))
    assert_parity(lambda q, k, v: ring_attention(q, k, v, context), layout, world.rank, bias=bias)


@pytest.mark.counted
@ranks(4)
@pytest.mark.parametrize(("cache", "backward_kv"), [("none", 2), ("half", 1), ("full", 0)])
def test_messages_and_bytes(world, cache, backward_kv):
    layout = SequenceLayout(S, ring=4)
    context = context_for(world, layout, cache=cache)
    q, k, v, grad_out = shares(draw(S), layout, world.rank)
    block = k.numel() * k.element_size()
    with count_communication() as forward:
        out = ring_attention(q, k, v, context)
    with count_communication() as backward:
        out.backward(grad_out)
    assert forward.calls("send") == 3 and forward.bytes("send") == 3 * 2 * block
    assert backward.calls("send") == 3 + (3 if backward_kv else 0)
    assert backward.bytes("send") == 3 * 2 * block + 3 * backward_kv * block
    assert not forward.calls("all_gather_into_tensor") and not backward.calls("all_reduce")


@pytest.mark.counted
@ranks(4)
def test_kernel_calls_and_saved_bytes(world):
    layout = SequenceLayout(S, ring=4)
    context = context_for(world, layout)
    q, k, v, grad_out = shares(draw(S), layout, world.rank)
    calls = []
    original = dispatch.choose
    dispatch.choose = lambda *args: calls.append(1) or original(*args)
    try:
        with saved_bytes() as saved:
            out = ring_attention(q, k, v, context)
        assert len(calls) == 4
        statistics = out.numel() // out.shape[-1] * 4
        assert saved.bytes == sum(tensor.numel() * 4 for tensor in (q, k, v, out)) + statistics
        out.backward(grad_out)
        assert len(calls) == 8
    finally:
        dispatch.choose = original
