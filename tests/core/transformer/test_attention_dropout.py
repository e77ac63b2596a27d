"""Attention dropout: under every algorithm equal to a dense reference with the same mask, in training only, repeatable."""

import pytest
import torch

from mindspeed.core.attention import Dropout
from mindspeed.core.context_parallel.adaptive.planner import AdaptivePlanner
from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.gathered_attention import heads_first, sequence_first
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.plan import ADAPTIVE, GATHER, HYBRID, HYBRID_ADAPTIVE, RING, ULYSSES, ContextPlan
from mindspeed.core.context_parallel.work import AttentionOptions
from mindspeed.testing import ranks
from mindspeed.testing.parity import assert_same_training
from tests.core.context_parallel.dense import assert_near, draw, hidden_pairs, shares
from tests.core.transformer.attention_of_a_run import Tracker, attention_of, layer, run_of

S, P, SCALE = 32, 0.3, 0.3
PLANS = {
    "one": ContextPlan(),
    "ring": ContextPlan(RING, 4),
    "cached double ring": ContextPlan(RING, 4, window=2, cache="half"),
    "ulysses": ContextPlan(ULYSSES, 4),
    "ulysses lean": ContextPlan(ULYSSES, 4, cache="full"),
    "hybrid": ContextPlan(HYBRID, 4, degree=2),
    "gather": ContextPlan(GATHER, 4),
    "adaptive": ContextPlan(ADAPTIVE, 4),
    "hybrid adaptive": ContextPlan(HYBRID_ADAPTIVE, 4, degree=2),
}


def kept_pairs(attention, layout, rank, gather):
    """Which probabilities survive, [B, N, S, S]: with unit vectors as values the output is the probabilities."""
    q, k, _, _ = shares(draw(S), layout, rank)
    identity = torch.eye(S)[layout.index(rank)].expand(2, 2, -1, -1).contiguous()
    kept = gather(attention(q.detach(), k.detach(), identity) != 0, 2)
    order = torch.cat([layout.index(other) for other in range(layout.ranks)])
    return kept[:, :, order.argsort()]


def dense_with(kept, layout):
    """Values and gradients in float64 with this dropout mask."""
    q, k, v, grad_out = draw(S)
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    key, value = (tensor.repeat_interleave(2, 1) for tensor in leaves[1:])
    scores = (SCALE * leaves[0] @ key.transpose(-1, -2)).masked_fill(hidden_pairs(layout, 2), float("-inf"))
    out = scores.softmax(-1) * kept / (1 - P) @ value
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.double())]


def assert_dropout(plan, groups, rank, gather):
    adaptive = AdaptivePlanner(groups) if plan.algorithm in (ADAPTIVE, HYBRID_ADAPTIVE) else None
    layout = LayoutMaker(plan, adaptive=adaptive).layout(S)
    options = AttentionOptions(SCALE, Dropout(P, 11))

    def attention(q, k, v):
        inputs = [sequence_first(tensor) for tensor in (q, k, v)]
        return heads_first(context_attention(*inputs, plan=plan, groups=groups, layout=layout, options=options))

    kept = kept_pairs(attention, layout, rank, gather)
    visible = ~hidden_pairs(layout, 2).expand_as(kept)
    assert not kept[~visible].any()
    share = kept[visible].float().mean().item()
    assert abs(share - (1 - P)) < 0.03
    for first in range(4):
        for second in range(first):
            assert not torch.equal(kept[:, first], kept[:, second]), "heads share a mask"
    q, k, v, grad_out = shares(draw(S), layout, rank)
    out = attention(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    expected = shares(dense_with(kept, layout), layout, rank)
    for ours, true in zip((out.detach(), *gradients), expected, strict=True):
        assert_near(ours, true.detach())


def test_on_one_device():
    assert_dropout(PLANS["one"], ContextGroups(), 0, lambda tensor, dim: tensor)


@ranks(4)
def test_under_every_algorithm(world):
    """Row 9 of the defects: gradients belong to the mask of the forward, for caches and windows too."""
    for plan in list(PLANS.values())[1:]:
        groups = ContextGroups()
        groups.create(plan, world.group, overlap=False)
        assert_dropout(plan, groups, world.rank, lambda tensor, dim: world.gather(tensor.int(), dim).bool())
        groups.drop()


def test_evaluation_drops_nothing():
    """Row 9 of the defects."""
    inputs = [tensor.detach() for tensor in shares(draw(S), SequenceLayout(S), 0)[:3]]
    plain = attention_of(run_of(), layer())(*inputs)
    assert torch.equal(attention_of(run_of(), layer(dropout=P, training=False))(*inputs), plain)
    assert not torch.equal(attention_of(run_of(), layer(dropout=P))(*inputs), plain)


@pytest.mark.parametrize(("sequence_parallel", "forks"), [(False, 1), (True, 0)])
def test_seeds_come_from_the_hosts_tracker(sequence_parallel, forks):
    tracker = Tracker()
    attention = attention_of(run_of(tracker=tracker), layer(dropout=P, sequence_parallel=sequence_parallel))
    inputs = draw(S)[:3]
    torch.manual_seed(3)
    first = attention(*inputs)
    assert tracker.forks == forks
    torch.manual_seed(3)
    again, other = attention(*inputs), attention(*inputs)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("recompute", ["full --recompute-method uniform --recompute-num-layers 1", "selective"])
def test_recomputation_is_bit_equal(recompute):
    flags = "--use-flash-attn --attention-dropout 0.3"
    assert_same_training(flags, f"{flags} --recompute-granularity {recompute}", rtol=0.0, weight_atol=0.0)
