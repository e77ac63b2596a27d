"""The ring as a function for programs with groups of their own, unequal blocks, buffers in flight, and disagreement."""

import gc
import weakref
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mindspeed.core.context_parallel import ring_attention as ring_module
from mindspeed.core.context_parallel.exchange import Exchange
from mindspeed.core.context_parallel.gathered_attention import heads_first, sequence_first
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.ring_attention import RingContext, ring_attention
from mindspeed.core.context_parallel.ring_context_parallel.ring_context_parallel import ringattn_context_parallel
from mindspeed.core.context_parallel.work import AlibiBias, AttentionOptions
from mindspeed.testing import ranks
from tests.core.context_parallel.dense import assert_parity, draw, shares

S = 64


def parameters(world, **more):
    return {
        "causal": True,
        "cp_group": world.group,
        "cp_size": world.size,
        "rank": world.rank,
        "cp_global_ranks": list(range(world.size)),
        **more,
    }


def function(cp_para, **options):
    def attention(q, k, v):
        inputs = [sequence_first(tensor).flatten(2) for tensor in (q, k, v)]
        out = ringattn_context_parallel(*inputs, q.shape[1], cp_para, 0.3, **options)
        return heads_first(out.unflatten(-1, (q.shape[1], -1)))

    return attention


@ranks(4)
def test_the_function_equals_dense(world):
    causal = SequenceLayout(S, ring=4)
    assert_parity(function(parameters(world)), causal, world.rank, value_dim=4)
    window = [world.rank // 2 * 2, world.rank // 2 * 2 + 1]
    inner = [dist.new_group([0, 1]), dist.new_group([2, 3])][world.rank // 2]
    outer = [dist.new_group([0, 1, 2, 3]) for _ in range(1)][0]
    double = dict(
        cp_inner_ranks=window,
        cp_outer_ranks=[world.rank % 2, world.rank % 2 + 2],
        cp_dkv_outer_ranks=[world.rank, (world.rank + 3) % 4],
        cp_group_for_intra_window=inner,
        cp_group_for_send_recv_overlap=outer,
        megatron_cp_in_bnsd=True,
        cache_policy="half",
    )
    assert_parity(function(parameters(world, **double)), causal, world.rank)
    blocks = SequenceLayout(S, ring=4, placement="contiguous", future=None)
    assert_parity(function(parameters(world, causal=False)), blocks, world.rank)
    hidden = torch.rand(2, 1, S, S, generator=torch.Generator().manual_seed(1)) < 0.3
    masked = SequenceLayout(S, ring=4, placement="contiguous", custom_mask=hidden)
    assert_parity(function(parameters(world), attn_mask=hidden), masked, world.rank)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    for kind, distance in ((2, "absolute"), (3, "root")):
        bias = AlibiBias(slopes, torch.arange(S), torch.arange(S), distance)(range(S), range(S))
        assert_parity(function(parameters(world, pse=slopes, pse_type=kind)), causal, world.rank, bias=bias)
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 21, 40]), cu_seqlens_q_padded=torch.tensor([0, 24, 64]))
    layout = SequenceLayout(S, ring=4, placement="document_zigzag", boundaries=((0, 21, 24, 43, 64),), cuts=((0, 24, 64),))
    assert_parity(function(parameters(world), packed_seq_params=packed), layout, world.rank, batch=1)


@ranks(4)
def test_unequal_blocks(world):
    for sizes, causal in (([13, 7, 20, 10], True), ((1, 30, 2, 17), False)):
        layout = SequenceLayout(50, ring=4, placement="contiguous", future=0 if causal else None, sizes=tuple(sizes))
        for shapes in (sizes, dict(enumerate(sizes))):
            assert_parity(function(parameters(world, causal=causal), shapes=shapes), layout, world.rank)
    with pytest.raises(ValueError, match=r"shapes \[13, 7, 20, 11\] must list 4 lengths|rank 3 holds"):
        q = torch.randn([13, 7, 20, 10][world.rank] + (world.rank < 3), 1, 8)
        ringattn_context_parallel(q, q, q, 2, parameters(world), shapes=[13, 7, 20, 11])


@ranks(2)
def test_dropout_of_the_function_is_drawn_from_the_default_generator(world):
    q, k, v = (torch.randn(8, 1, 16) for _ in range(3))

    def out(seed):
        torch.manual_seed(seed)
        return ringattn_context_parallel(q, k, v, 2, parameters(world), dropout_p=0.5)

    assert torch.equal(out(1), out(1)) and not torch.equal(out(1), out(2))


@ranks(2)
def test_parameters_that_contradict_the_group_are_refused(world):
    q = torch.randn(4, 1, 8)
    for changes, words in (
        ({"cp_size": 3}, r"say \(3, "),
        ({"cp_inner_ranks": [1, 0]}, r"cp_inner_ranks \[1, 0\] are no window"),
        ({"cache_policy": "some"}, "cache_policy 'some'"),
        ({"kv_gradient_dtype": torch.float16}, "kv_gradient_dtype torch.float16 is neither None"),
        ({"pse_type": 1}, "pse_type 1 is none of 0, 2 and 3"),
        ({"cp_rank": 0}, r"unknown \['cp_rank'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            ringattn_context_parallel(q, q, q, 2, parameters(world, **changes))
    incomplete = parameters(world)
    del incomplete["cp_group"]
    with pytest.raises(ValueError, match=r"lacks \['cp_group'\]"):
        ringattn_context_parallel(q, q, q, 2, incomplete)


@ranks(2)
def test_ranks_that_disagree_on_the_length_get_an_error(world):
    """Acceptance (k): an error on every rank, no hang; for every shape that is new, also after others were agreed on."""
    for length in (8, 16):
        q = torch.randn(length, 1, 8)
        ringattn_context_parallel(q, q, q, 2, parameters(world))
        other = torch.randn(length + 4 + 4 * world.rank, 1, 8)
        words = rf"equally shaped q, k and v, got rank 0: q \(1, 2, {length + 4}, 4\).*rank 1: q \(1, 2, {length + 8}, 4\)"
        with pytest.raises(ValueError, match=words):
            ringattn_context_parallel(other, other, other, 2, parameters(world))
    q = torch.randn(10, 1, 8, dtype=(torch.float32, torch.float64)[world.rank])
    with pytest.raises(ValueError, match=r"q \(1, 2, 10, 4\) float32.*q \(1, 2, 10, 4\) float64"):
        ringattn_context_parallel(q, q, q, 2, parameters(world))
    q, shapes = torch.randn(6, 1, 8), ([6, 6], [7, 6])[world.rank]
    with pytest.raises(ValueError, match=r"rank 0: shapes \(6, 6\).*rank 1: shapes \(7, 6\)"):
        ringattn_context_parallel(q, q, q, 2, parameters(world), shapes=shapes)


@ranks(2)
def test_a_destroyed_group_is_not_kept_by_what_was_compared_in_it(world):
    """Its threads and sockets would stay with it."""
    group, q = dist.new_group([0, 1]), torch.randn(8, 1, 8)
    watched = weakref.ref(group)
    ringattn_context_parallel(q, q, q, 2, parameters(world) | {"cp_group": group})
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert watched() is None


@ranks(2)
def test_a_rank_whose_shape_nobody_else_has_does_not_wait_for_ever(world):
    """The others know their shape and do not compare any more; both sides end with the group's timeout."""
    group = dist.new_group([0, 1])
    cp_para = parameters(world) | {"cp_group": group}
    known, new = torch.randn(8, 1, 8), torch.randn(12, 1, 8)
    ringattn_context_parallel(known, known, known, 2, cp_para)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
    mine = new if world.rank else known
    with pytest.raises(RuntimeError, match=r"q \(1, 2, 12, 4\) float32.* for the first time" if world.rank else None):
        ringattn_context_parallel(mine, mine, mine, 2, cp_para)


def checksums_in_flight(passing, seen):
    """`Exchange.passing` that compares what it sends at post and at completion."""

    @contextmanager
    def watched(self, tensor, **where):
        before = tensor.detach().clone()
        with passing(self, tensor, **where) as incoming:
            yield incoming
            seen.append(torch.equal(before, tensor))

    return watched


@ranks(8)
def test_no_buffer_is_written_while_a_send_of_it_is_in_flight(world):
    """Acceptance (g) and row 11 of the defects: windows of 4, forward and backward."""
    layout, seen, passing = SequenceLayout(S, ring=8), [], Exchange.passing
    Exchange.passing = checksums_in_flight(passing, seen)
    try:
        context = RingContext(Exchange(world.group), world.rank, layout, AttentionOptions(0.3), window=4)
        assert_parity(lambda q, k, v: ring_attention(q, k, v, context), layout, world.rank, batch=1, dim=4)
    finally:
        Exchange.passing = passing
    assert len(seen) == 3 * 7 and all(seen)


@ranks(2)
def test_a_step_is_computed_before_its_transfer_is_waited_for(world):
    """Acceptance (f): posts, then computes, then waits."""
    events, passing, forward = [], Exchange.passing, ring_module.forward_block

    @contextmanager
    def logged(self, tensor, **where):
        events.append("post")
        with passing(self, tensor, **where) as incoming:
            yield incoming
            events.append("wait")

    def computed(*args):
        states = forward(*args)
        events.append("computed")
        return states

    q, k, v, _ = shares(draw(S), SequenceLayout(S, ring=2), world.rank)
    Exchange.passing, ring_module.forward_block = logged, computed
    try:
        ring_attention(
            q, k, v, RingContext(Exchange(world.group), world.rank, SequenceLayout(S, ring=2), AttentionOptions(0.3))
        )
    finally:
        Exchange.passing, ring_module.forward_block = passing, forward
    assert events == ["post", "computed", "wait", "computed"]
