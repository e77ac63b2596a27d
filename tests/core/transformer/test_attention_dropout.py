"""Attention dropout: under every algorithm the mask of one device, gradients that belong to it, in training only, repeatable."""

import functools

import pytest
import torch

from mindspeed.core.attention import CAUSAL, Dropout, Scoring
from mindspeed.core.attention.math_kernel import MathKernel
from mindspeed.core.context_parallel.adaptive.planner import AdaptivePlanner
from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.gathered_attention import heads_first, sequence_first
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
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


@functools.cache
def mask_of_one_device():
    """What survives of all pairs of two samples and four heads: every algorithm must drop the same."""
    return Dropout(P, 11).multipliers(2, 4, range(S), range(S), torch.empty(0)) != 0


def dense_with(kept, layout):
    """Values and gradients in float64 with this dropout mask."""
    q, k, v, grad_out = draw(S)
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    key, value = (tensor.repeat_interleave(2, 1) for tensor in leaves[1:])
    scores = (SCALE * leaves[0] @ key.transpose(-1, -2)).masked_fill(hidden_pairs(layout, 2), float("-inf"))
    out = scores.softmax(-1) * kept / (1 - P) @ value
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.double())]


def layouts_of(plan, groups):
    """Causal, documents that differ between samples, and a custom mask; the adaptive algorithms have no documents."""
    hidden = torch.rand(2, 1, S, S, generator=torch.Generator().manual_seed(2)) < 0.3
    hidden[:, :, :, 0] = False
    if plan.algorithm in (ADAPTIVE, HYBRID_ADAPTIVE):
        planner = AdaptivePlanner(groups)
        return [planner.remapped(plan.layout(S, custom_mask=mask)) for mask in (None, hidden)]
    documents = ((0, 5, 29, 32), (0, 32))
    return [plan.layout(S), plan.layout(S, boundaries=documents), plan.layout(S, custom_mask=hidden)]


def assert_dropout(plan, groups, layout, rank, gather):
    options = AttentionOptions(SCALE, Dropout(P, 11))

    def attention(q, k, v):
        inputs = [sequence_first(tensor) for tensor in (q, k, v)]
        return heads_first(context_attention(*inputs, plan=plan, groups=groups, layout=layout, options=options))

    kept = kept_pairs(attention, layout, rank, gather)
    assert torch.equal(kept, mask_of_one_device() & ~hidden_pairs(layout, 2))
    q, k, v, grad_out = shares(draw(S), layout, rank)
    out = attention(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    expected = shares(dense_with(kept, layout), layout, rank)
    for ours, true in zip((out.detach(), *gradients), expected, strict=True):
        assert_near(ours, true.detach())


def test_masks_look_random():
    """Bernoulli with the right rate, whatever is compared: rows, keys, heads, samples, seeds, and corners of rectangles."""
    size, p = 256, 0.3
    first, second = (Dropout(p, seed).multipliers(2, 2, range(size), range(size), torch.empty(0)) != 0 for seed in (5, 6))
    noise = (first.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    other = (second.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    products = {
        "rate": noise,
        "rows": noise[..., 1:, :] * noise[..., :-1, :],
        "keys": noise[..., 1:] * noise[..., :-1],
        "heads": noise[:, 0] * noise[:, 1],
        "samples": noise[0] * noise[1],
        "transposed": (noise * noise.transpose(-1, -2)).triu(1) * 2**0.5,
        "seeds": noise * other,
        "samples of seeds": noise[1] * other[0],
        "corners": noise[..., 1:, 1:] * noise[..., :-1, :-1] * noise[..., 1:, :-1] * noise[..., :-1, 1:],
    }
    for name, product in products.items():
        assert abs(product.sum().item()) < 4.5 * product.numel() ** 0.5, name
    assert (first != second).any()


@pytest.mark.parametrize(("p", "every"), [(0.0, 1.0), (1.0, 0.0)])
def test_all_or_nothing(p, every):
    assert (Dropout(p, 5).multipliers(1, 1, range(9), range(9), torch.empty(0)) == every).all()


@pytest.mark.parametrize("places", [None, torch.arange(5)], ids=["counted", "given"])
def test_mask_does_not_depend_on_the_default_device(places):
    drop, like = Dropout(0.3, 7, queries=places, keys=places), torch.empty(0)
    expected = drop.multipliers(1, 2, range(1, 4), range(5), like)
    with torch.device("meta"):
        torch.testing.assert_close(drop.multipliers(1, 2, range(1, 4), range(5), like), expected)


@pytest.mark.parametrize("max_scores", [1, 64, 1 << 22])
def test_mask_does_not_depend_on_chunks(max_scores):
    q, k, v, _ = (tensor.detach() for tensor in draw(S))
    scoring = Scoring(SCALE, CAUSAL, dropout=Dropout(P, 11))
    out, *_ = MathKernel(max_scores).forward(q, k, v, scoring)
    torch.testing.assert_close(out, MathKernel().forward(q, k, v, scoring)[0])


def test_on_one_device():
    for layout in layouts_of(PLANS["one"], ContextGroups()):
        assert_dropout(PLANS["one"], ContextGroups(), layout, 0, lambda tensor, dim: tensor)


@ranks(4)
def test_under_every_algorithm(world):
    """Row 9 of the defects: gradients belong to the mask of the forward, for caches and windows too."""
    for plan in list(PLANS.values())[1:]:
        groups = ContextGroups()
        groups.create(plan, world.group, overlap=False)
        for layout in layouts_of(plan, groups):
            assert_dropout(plan, groups, layout, world.rank, lambda tensor, dim: world.gather(tensor.int(), dim).bool())
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


ROPE = "--position-embedding-type rope --group-query-attention --num-query-groups 2"
FLAGS = {
    "ring": "--context-parallel-size 2",
    "ulysses": "--context-parallel-size 4 --context-parallel-algo ulysses_cp_algo",
    "gather": "--context-parallel-size 2 --context-parallel-algo kvallgather_cp_algo",
    "adaptive": "--context-parallel-size 4 --context-parallel-algo adaptive_cp_algo",
    "double ring": "--context-parallel-size 4 --cp-window-size 2",
    "hybrid": "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
}


def assert_trains_as_one(name):
    base = f"{ROPE} --use-flash-attn --attention-dropout 0.3"
    world = int(FLAGS[name].split()[1])
    assert_same_training(base, f"{base} {FLAGS[name]}", world_b=world, features=["context-parallel"])


def test_training_drops_the_same_on_four_ranks():
    assert_trains_as_one("hybrid")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "hybrid"])
def test_training_drops_the_same_under_every_algorithm(name):
    assert_trains_as_one(name)
