"""Every algorithm through the one call, with the groups it makes itself, against dense attention."""

import logging

import pytest
import torch

from mindspeed.core.attention import Dropout
from mindspeed.core.context_parallel.adaptive.planner import AdaptivePlanner
from mindspeed.core.context_parallel.batches import BatchLayouts
from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.gathered_attention import heads_first, sequence_first
from mindspeed.core.context_parallel.groups import ContextGroups, group_members
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.plan import ADAPTIVE, GATHER, HYBRID, HYBRID_ADAPTIVE, RING, ULYSSES, ContextPlan
from mindspeed.core.context_parallel.scope import current_layout
from mindspeed.core.context_parallel.work import AlibiBias, AttentionOptions
from mindspeed.notices import warn_once
from mindspeed.testing import ranks
from tests.core.context_parallel.dense import assert_parity

S = 64
DOCUMENTS = ((0, 5, 29, 64), (0, 64))
PLANS = {
    "ring": ContextPlan(RING, 4),
    "double-ring": ContextPlan(RING, 4, window=2),
    "ring-blocks": ContextPlan(RING, 4, mask_type="general"),
    "ulysses": ContextPlan(ULYSSES, 4),
    "ulysses-lean": ContextPlan(ULYSSES, 4, cache="full"),
    "ulysses-allgather": ContextPlan(ULYSSES, 4, allgather_kv=True, cache="half"),
    "hybrid": ContextPlan(HYBRID, 4, degree=2, cache="full"),
    "gather": ContextPlan(GATHER, 4),
}
MASKS = {
    "causal": {},
    "full": {"future": None},
    "band": {"past": 9},
    "documents": {"boundaries": DOCUMENTS},
}


def test_members_of_groups():
    hybrid = ContextPlan(HYBRID, 8, degree=2, window=2)
    assert group_members(hybrid, range(8), overlap=True) == {
        "cp_ulysses": [(0, 1), (2, 3), (4, 5), (6, 7)],
        "cp_ring": [(0, 2, 4, 6), (1, 3, 5, 7)],
        "cp2": [(0, 2, 4, 6), (1, 3, 5, 7)],
        "cp_ring_intra": [(0, 2), (4, 6), (1, 3), (5, 7)],
        "cp_ring_intra_overlap": [(0, 2), (4, 6), (1, 3), (5, 7)],
    }
    assert group_members(ContextPlan(ULYSSES, 4), range(4), overlap=True) == {}
    assert group_members(ContextPlan(RING, 4), [1, 3, 5, 7], overlap=True) == {"cp2": [(1, 3, 5, 7)]}


def test_placements_follow_the_table():
    def placement(plan, boundaries=None):
        return plan.layout(S, boundaries=boundaries).placement

    long, short = ((0, S * 8),), ((0, 3, 9, S * 8),)
    assert placement(ContextPlan(RING, 2)) == "zigzag" and placement(ContextPlan(RING, 2, mask_type="general")) == "contiguous"
    assert placement(ContextPlan(RING, 2), long) == "document_zigzag" and placement(ContextPlan(RING, 2), short) == "zigzag"
    assert placement(ContextPlan(RING, 2, mask_type="general"), long) == "zigzag"
    assert placement(ContextPlan(ULYSSES, 2)) == "contiguous" and placement(ContextPlan(GATHER, 2), long) == "contiguous"


def test_cached_layers():
    def layers(interval):
        plan = ContextPlan(RING, 2, cache="full", cache_interval=interval)
        return [layer for layer in range(1, 13) if plan.caches(layer)]

    assert layers(0) == list(range(1, 13)) and layers(1) == [1, 3, 5, 7, 9, 11]
    assert layers(4) == [1, 6, 11] and layers(5) == [1, 7]
    assert not ContextPlan(RING, 2).caches(1)


def attention_of(plan, groups, layout, options):
    def attention(q, k, v):
        inputs = [sequence_first(tensor) for tensor in (q, k, v)]
        return heads_first(context_attention(*inputs, plan=plan, groups=groups, layout=layout, options=options))

    return attention


@ranks(4)
@pytest.mark.parametrize("name", PLANS)
def test_every_algorithm_and_mask_equals_dense(world, name):
    plan, groups = PLANS[name], ContextGroups()
    groups.create(plan, world.group, overlap=True)
    options = AttentionOptions(0.3)
    sizes = {"groups": 1} if plan.allgather_kv else {"groups": 2}
    for mask in MASKS.values():
        layout = plan.layout(S, **mask)
        assert_parity(attention_of(plan, groups, layout, options), layout, world.rank, **sizes)
    hidden = torch.rand(2, 1, S, S, generator=torch.Generator().manual_seed(1)) < 0.3
    layout = plan.layout(S, custom_mask=hidden)
    assert_parity(attention_of(plan, groups, layout, options), layout, world.rank, **sizes)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    bias = AlibiBias(slopes, torch.arange(S), torch.arange(S))(range(S), range(S))
    layout = plan.layout(S)
    options = AttentionOptions(0.3, slopes=slopes)
    assert_parity(attention_of(plan, groups, layout, options), layout, world.rank, bias=bias, **sizes)
    groups.drop()
    assert groups.cp is None and groups.get("cp_ring") is None


def assert_shapes(world, plan):
    """Odd shares, grouped and single key heads, one and two samples, values of another size, fp32 and bf16."""
    groups, heads = ContextGroups(), 8
    groups.create(plan, world.group, overlap=False)
    planner = AdaptivePlanner(groups) if plan.algorithm in (ADAPTIVE, HYBRID_ADAPTIVE) else None
    length = 14 * world.size  # chunks of 7
    hidden = torch.rand(length, length, generator=torch.Generator().manual_seed(3)) < 0.6
    hidden[5], hidden[length - 1] = True, True
    masks = [{}, {"past": 11}, {"custom_mask": hidden}]
    for mask in masks if planner else [*masks, {"future": None}, {"boundaries": ((0, 1, 2, 31, length), (0, length))}]:
        layout = plan.layout(length, **mask)
        layout = planner.remapped(layout) if planner else layout
        attention = attention_of(plan, groups, layout, AttentionOptions(0.3))
        sizes = [dict(groups=2), dict(groups=1, value_dim=4), dict(groups=8, dtype=torch.bfloat16), dict(groups=2, batch=1)]
        for size in [dict(groups=1)] if plan.allgather_kv else sizes:
            if size.get("batch") != 1 or not layout.samples_differ:
                assert_parity(attention, layout, world.rank, heads=heads, **size)
    groups.drop()


MORE = {"adaptive": ContextPlan(ADAPTIVE, 4), "hybrid adaptive": ContextPlan(HYBRID_ADAPTIVE, 4, degree=2)}


@ranks(4)
@pytest.mark.parametrize("name", [*PLANS, *MORE])
def test_odd_shares_and_any_heads(world, name):
    assert_shapes(world, (PLANS | MORE)[name])


EIGHT = {
    "ring": ContextPlan(RING, 8),
    "double ring of 2": ContextPlan(RING, 8, window=2, cache="full"),
    "double ring of 4": ContextPlan(RING, 8, window=4),
    "hybrid 2 x 4": ContextPlan(HYBRID, 8, degree=2),
    "hybrid 2 x double ring": ContextPlan(HYBRID, 8, degree=2, window=2, cache="half"),
    "hybrid 4 x 2": ContextPlan(HYBRID, 8, degree=4),
    "ulysses": ContextPlan(ULYSSES, 8),
    "gather": ContextPlan(GATHER, 8),
    "adaptive": ContextPlan(ADAPTIVE, 8),
    "hybrid adaptive": ContextPlan(HYBRID_ADAPTIVE, 8, degree=2),
}


@pytest.mark.slow
@ranks(8)
@pytest.mark.parametrize("name", EIGHT)
def test_eight_ranks(world, name):
    assert_shapes(world, EIGHT[name])


def test_flags_reach_the_plan():
    plan = ContextPlan.of({"use_fused_ring_attention_update": True, "megatron_cp_in_bnsd": True})
    assert (plan.fused_update, plan.memory_order) == (True, "BNSD")
    plan = ContextPlan.of({})
    assert (plan.fused_update, plan.memory_order) == (False, "SBH")


@ranks(2)
def test_plan_decides_how_the_ring_merges_and_arranges(world):
    from mindspeed.core.context_parallel import context_attention as module

    contexts, original = [], module.ring_attention
    module.ring_attention = lambda q, k, v, context: contexts.append(context) or original(q, k, v, context)
    plan, groups = ContextPlan(RING, 2, fused_update=True, memory_order="BNSD"), ContextGroups()
    groups.create(plan, world.group, overlap=False)
    layout = plan.layout(S)
    try:
        assert_parity(attention_of(plan, groups, layout, AttentionOptions(0.3)), layout, world.rank)
    finally:
        module.ring_attention = original
    (context,) = contexts
    assert context.fused_update and context.options.memory_order == "BNSD"


@ranks(4)
def test_dropout_repeats_with_its_seed_and_has_consistent_gradients(world):
    """For a fixed mask attention is linear in v, so <dv, v> must equal <dout, out>."""
    plan, groups = PLANS["hybrid"], ContextGroups()
    groups.create(plan, world.group, overlap=False)
    attention = attention_of(plan, groups, plan.layout(S), AttentionOptions(0.3, Dropout(0.4, 5)))
    q, k, v, grad = (torch.randn(1, 4, S // 4, 8, requires_grad=True) for _ in range(4))
    out = attention(q, k, v)
    assert torch.equal(out, attention(q, k, v))
    (dv,) = torch.autograd.grad(out, v, grad)
    sums = torch.stack([(dv * v).sum(), (out * grad).sum()]).detach()
    torch.distributed.all_reduce(sums)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-3)


def test_one_device_needs_no_groups():
    plan = ContextPlan()
    layout = plan.layout(37, boundaries=DOCUMENTS[:0] or ((0, 5, 37), (0, 37)))
    assert_parity(attention_of(plan, ContextGroups(), layout, AttentionOptions(0.3)), layout, 0)


def test_a_batch_that_nobody_cut_is_named_where_the_hosts_slices_do_not_fit(caplog):
    for plan, named in (
        (ContextPlan(ULYSSES, 2), True),
        (ContextPlan(RING, 2, mask_type="general"), True),
        (ContextPlan(RING, 2), False),
    ):
        warn_once.cache_clear()
        caplog.clear()
        batches = BatchLayouts(LayoutMaker(plan), ContextGroups())
        with caplog.at_level(logging.WARNING, logger="mindspeed"), batches.around_model(64):
            assert current_layout() is None
        assert ("was not cut by get_batch_on_this_cp_rank" in caplog.text) == named
