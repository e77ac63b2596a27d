"""Gradients of keys and values that travel in bf16: half the bytes, for an error that the page states."""

import pytest
import torch

from mindspeed.core.attention import Accumulator, GradientSum
from mindspeed.core.context_parallel import context_attention as module
from mindspeed.core.context_parallel.exchange import Exchange
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.plan import RING, ContextPlan
from mindspeed.core.context_parallel.ring_attention import RingContext, RingRoute, ring_attention
from mindspeed.core.context_parallel.work import AttentionOptions, backward_block, forward_block, plan_work
from mindspeed.testing import count_communication, ranks
from tests.core.context_parallel.dense import assert_parity, draw, shares

S = 64
BF16 = torch.bfloat16


def traffic_and_gradients(world, window, cache, gradient_dtype):
    """Bytes that backward sends, and (dq, dk, dv), of one bf16 layer."""
    layout = SequenceLayout(S, ring=world.size)
    context = RingContext(
        Exchange(world.group),
        world.rank,
        layout,
        AttentionOptions(0.3),
        window=window,
        cache=cache,
        gradient_dtype=gradient_dtype,
    )
    q, k, v, grad_out = shares(draw(S, dtype=BF16), layout, world.rank)
    out = ring_attention(q, k, v, context)
    with count_communication() as counted:
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    return counted.bytes("send"), gradients, k.numel()


@pytest.mark.counted
@ranks(4)
@pytest.mark.parametrize("window", [1, 2])
def test_messages_shrink_by_half_and_gradients_stay(world, window):
    wide, expected, block = traffic_and_gradients(world, window, "full", None)
    narrow, found, _ = traffic_and_gradients(world, window, "full", BF16)
    assert (wide, narrow) == (3 * 2 * block * 4, 3 * 2 * block * 2)
    assert torch.equal(found[0], expected[0])  # queries stay at home
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == theirs.dtype == BF16
        assert (ours.float() - theirs.float()).norm() <= 8e-3 * theirs.float().norm()


@ranks(2)
@pytest.mark.parametrize("boundaries", [None, ((0, 5, 29, 64), (0, 64))])
def test_several_tiles_and_parts_of_a_block(world, boundaries):
    layout = SequenceLayout(S, ring=2, boundaries=boundaries)
    context = RingContext(Exchange(world.group), world.rank, layout, AttentionOptions(0.3), gradient_dtype=BF16)
    assert_parity(lambda q, k, v: ring_attention(q, k, v, context), layout, world.rank, dtype=BF16)


@pytest.mark.parametrize(("given", "expected"), [({}, None), ({"cp_kv_gradient_dtype": "bf16"}, BF16)])
def test_the_flag_reaches_the_plan(given, expected):
    assert ContextPlan.of(given).gradient_dtype is expected


@ranks(2)
def test_the_plan_reaches_the_ring(world):
    contexts, original = [], module.ring_attention
    module.ring_attention = lambda q, k, v, context: contexts.append(context) or original(q, k, v, context)
    plan, groups = ContextPlan(RING, 2, gradient_dtype=BF16), ContextGroups()
    groups.create(plan, world.group, overlap=False)
    q = torch.randn(S // 2, 1, 2, 8, dtype=BF16)
    try:
        module.context_attention(q, q, q, plan=plan, groups=groups, layout=plan.layout(S), options=AttentionOptions(0.3))
    finally:
        module.ring_attention = original
    assert contexts[0].gradient_dtype is BF16


def error_of_keys(ring, travelling, size=1024):
    """Relative error of dk and dv of a ring's arithmetic, summed in the order of the ring, beside fp64."""
    q, k, v, grad = draw(size, heads=2, groups=2, dim=32, batch=1, dtype=BF16)
    layout, options = SequenceLayout(size, ring=ring), AttentionOptions(32**-0.5)
    index = [layout.index(rank) for rank in range(ring)]
    parts = {}
    for rank in range(ring):
        query, gradient = q[:, :, index[rank]], grad[:, :, index[rank]]
        total = Accumulator(query, 32)
        work = {block: plan_work(layout, rank, block, 1, options) for block in range(ring)}
        keys = {block: (k[:, :, index[block]], v[:, :, index[block]]) for block in range(ring)}
        states = {block: forward_block(query, *keys[block], work[block], total) for block in range(ring)}
        saved = gradient, query, total.out.to(BF16), total.lse
        for block in range(ring):
            parts[rank, block] = backward_block(saved, *keys[block], work[block], states[block], GradientSum(query))
    found = [torch.zeros(tensor.shape, dtype=torch.float64) for tensor in (k, v)]
    for block in range(ring):
        order = [RingRoute((block - 1 - step) % ring, ring).rank for step in range(ring)]
        for place, result in enumerate(found):
            message = torch.zeros(result[:, :, index[block]].shape, dtype=travelling)
            for rank in order:
                parts[rank, block][place].add_to(message)
            result[:, :, index[block]] = message.to(BF16).double()
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    weights = (leaves[0] @ leaves[1].transpose(-1, -2) * 32**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    truth = torch.autograd.grad(weights @ leaves[2], leaves[1:], grad.double())
    return max(((ours - true).norm() / true.norm()).item() for ours, true in zip(found, truth, strict=True))


@pytest.mark.parametrize(("ring", "growth"), [(2, 1.05), (4, 1.15), (8, 1.3)])
def test_the_error_that_the_page_states(ring, growth):
    narrow, wide = error_of_keys(ring, BF16), error_of_keys(ring, torch.float32)
    print(f"ring {ring}: {wide:.2e} in fp32, {narrow:.2e} in bf16, {narrow / wide:.2f} times")
    assert wide <= 5e-3 and narrow <= growth * wide
