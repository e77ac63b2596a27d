"""Ulysses, with equal and unequal pieces, and attention over gathered keys, against dense attention."""

import math
from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed.core.attention import Scoring
from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.gathered_attention import (
    GatheredPlan,
    HeadMove,
    SequenceMove,
    gathered_attention,
    heads_first,
    sequence_first,
)
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout, positions_of
from mindspeed.core.context_parallel.placement import Segment
from mindspeed.core.context_parallel.plan import ULYSSES, ContextPlan
from mindspeed.core.context_parallel.ring_attention import RingContext, ring_attention
from mindspeed.core.context_parallel.tiles import plan_tiles
from mindspeed.core.context_parallel.ulysses import heads_to_sequence, repeats_needed, sequence_to_heads
from mindspeed.core.context_parallel.ulysses_context_parallel.ulysses_context_parallel import (
    DynamicGatherSizeCalculator,
    GatherSizeCalculator,
    UlyssesContextAttention,
)
from mindspeed.core.context_parallel.ulysses_context_parallel.unaligned_cp.mapping import (
    all_to_all,
    cal_split_sizes,
    gather_forward_split_backward,
    split_forward_gather_backward,
)
from mindspeed.core.context_parallel.work import AttentionOptions, Work, plan_work
from mindspeed.testing import count_communication, ranks, saved_bytes
from tests.core.context_parallel.dense import assert_near, assert_parity, dense, draw, shares

S = 32
OPTIONS = AttentionOptions(0.3)
DOCUMENTS = ((0, 5, 19, 32), (0, 32))


@pytest.mark.parametrize("heads", [1, 6, 8, 12, 24, 60, 64])
def test_repeated_heads_serve_exactly_their_queries(heads):
    for groups in (g for g in range(1, heads + 1) if heads % g == 0):
        for degree in (c for c in range(1, heads + 1) if heads % c == 0):
            repeats = repeats_needed(groups, degree)
            repeated = [head for head in range(groups) for _ in range(repeats)]
            assert len(repeated) % degree == 0
            per_rank_keys, per_rank_queries = len(repeated) // degree, heads // degree
            for rank in range(degree):
                keys = repeated[rank * per_rank_keys : (rank + 1) * per_rank_keys]
                for query in range(per_rank_queries):
                    wanted = (rank * per_rank_queries + query) // (heads // groups)
                    assert keys[query // (per_rank_queries // per_rank_keys)] == wanted


def fused(group, layout):
    """q, k, v in one exchange, then one block, then back."""

    def attention(q, k, v):
        repeats = repeats_needed(k.shape[1], dist.get_world_size(group))
        inputs = [sequence_first(t) for t in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))]
        inside = [heads_first(t) for t in sequence_to_heads(tuple(inputs), group)]
        out = ring_attention(*inside, RingContext(None, 0, layout, OPTIONS))
        return heads_first(heads_to_sequence(sequence_first(out), group))

    return attention


def lean(group, layout, keep):
    """Keys and values exchanged inside the attention's own function, so that it may keep the local ones."""

    def attention(q, k, v):
        plan = GatheredPlan(HeadMove(group, k.shape[1]), plan_work(layout, 0, 0, q.shape[0], OPTIONS), keep)
        query = sequence_to_heads((sequence_first(q),), group)[0]
        return heads_first(heads_to_sequence(gathered_attention(query, sequence_first(k), sequence_first(v), plan), group))

    return attention


@ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_ranks_equal_dense(world, dtype):
    layout = SequenceLayout(S, ulysses=2, boundaries=DOCUMENTS)
    for groups in (4, 2, 1):
        for attention in (
            fused(world.group, layout),
            *(lean(world.group, layout, keep) for keep in ("gathered", "half", "local")),
        ):
            assert_parity(attention, layout, world.rank, groups=groups, dtype=dtype, value_dim=4)


@ranks(4)
def test_four_ranks_equal_dense(world):
    layout = SequenceLayout(S, ulysses=4, past=7)
    for groups in (4, 2, 1):
        assert_parity(fused(world.group, layout), layout, world.rank, groups=groups)
    wide = dict(heads=12, groups=6)  # more key heads than ranks, and no multiple of them
    assert_parity(fused(world.group, layout), layout, world.rank, **wide)
    assert_parity(lean(world.group, layout, "local"), layout, world.rank, **wide)


@pytest.mark.counted
@ranks(4)
def test_exchanges_bytes_and_saved_bytes(world):
    layout = SequenceLayout(S, ulysses=4)
    q, k, v, grad_out = shares(draw(S, groups=1), layout, world.rank)
    element, share = 4, 3 / 4
    with count_communication() as counted:
        fused(world.group, layout)(q, k, v).backward(grad_out)
    assert counted.calls("all_to_all", phase="forward") == 2 and counted.calls("all_to_all", phase="backward") == 2
    moved = (q.numel() + 4 * k.numel() + 4 * v.numel() + q.numel()) * element * share
    assert counted.bytes("all_to_all", phase="forward") == counted.bytes("all_to_all", phase="backward") == moved
    sizes = {}
    for keep, again in (("gathered", 0), ("half", 1), ("local", 2)):
        with count_communication() as counted, saved_bytes() as saved:
            out = lean(world.group, layout, keep)(q, k, v)
            sizes[keep] = saved.bytes
        with count_communication() as counted:
            out.backward(grad_out)
        assert counted.calls("all_to_all") == 4 + again
    gain = (4 - 1) * k.numel() * element  # one key head repeated four times, of which a rank holds one for 4 s tokens
    assert sizes["gathered"] - sizes["half"] == gain and sizes["half"] - sizes["local"] == gain


class Copies(TorchDispatchMode):
    """Elements that copies and casts write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("copy_", "clone", "_to_copy", "cat", "add_", "zero_", "fill_"):
            self.elements += result.numel()
        return result


@pytest.mark.counted
@ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_tensor_is_copied_into_a_message_and_out_of_one(world, dtype):
    """Nothing else moves data around the exchanges: one tile is neither widened nor added to zeros."""
    plan, groups = ContextPlan(ULYSSES, 4), ContextGroups()
    groups.create(plan, world.group, overlap=False)
    layout = plan.layout(S)
    q, k, v, grad_out = (
        sequence_first(t).detach().requires_grad_() for t in shares(draw(S, heads=8, groups=8, dtype=dtype), layout, world.rank)
    )

    def attention():
        return context_attention(q, k, v, plan=plan, groups=groups, layout=layout, options=OPTIONS)

    attention()  # the first call of a shape compares it between ranks
    with Copies() as forward:
        out = attention()
    with Copies() as backward:
        torch.autograd.grad(out, (q, k, v), grad_out)
    assert forward.elements == backward.elements == 2 * 4 * q.numel()
    groups.drop()


@ranks(4)
def test_policies_give_equal_bits_with_several_tiles(world):
    """bf16 and documents: each key gradient is summed from tiles in fp32, cast, exchanged, and summed over copies of its head."""
    groups, results = ContextGroups(), {}
    layout = SequenceLayout(S, ulysses=4, boundaries=DOCUMENTS)
    inputs = [sequence_first(t).detach().requires_grad_() for t in shares(draw(S, dtype=torch.bfloat16), layout, world.rank)]
    for policy in (None, "half", "full"):
        plan = ContextPlan(ULYSSES, 4, cache=policy)
        groups.create(plan, world.group, overlap=False)
        out = context_attention(*inputs[:3], plan=plan, groups=groups, layout=layout, options=OPTIONS)
        results[policy] = [out.detach(), *torch.autograd.grad(out, inputs[:3], inputs[3])]
        groups.drop()
    for policy in ("half", "full"):
        assert all(torch.equal(ours, plain) for ours, plain in zip(results[policy], results[None], strict=True))


def gathered_keys(world, layout, keep="gathered"):
    """All-gather of keys and values; queries in zigzag."""
    positions = torch.cat([layout.index(rank) for rank in range(world.size)])
    order = positions.argsort()
    chunks = sorted(segment for rank in range(world.size) for segment in layout.segments(rank))

    def attention(q, k, v):
        tiles = plan_tiles(layout.segments(world.rank), tuple(chunks), layout.rule())
        work = tuple(Work(slice(0, q.shape[0]), tile.rows, tile.keys, Scoring(0.3, tile.visible)) for tile in tiles)
        plan = GatheredPlan(SequenceMove(world.group, order), work, keep)
        return heads_first(gathered_attention(*(sequence_first(t) for t in (q, k, v)), plan))

    return attention


@ranks(4)
def test_all_gathered_keys_equal_dense(world):
    for layout in (
        SequenceLayout(S, ring=4),
        SequenceLayout(S, ring=4, past=5),
        SequenceLayout(S, ring=4, placement="contiguous"),
    ):
        for keep in ("gathered", "half", "local"):
            assert_parity(gathered_keys(world, layout, keep), layout, world.rank)


@pytest.mark.counted
@ranks(4)
def test_all_gather_traffic(world):
    layout = SequenceLayout(S, ring=4)
    q, k, v, grad_out = shares(draw(S), layout, world.rank)
    with count_communication() as counted:
        gathered_keys(world, layout, "local")(q, k, v).backward(grad_out)
    block = k.numel() * 4
    assert counted.bytes("all_gather", phase="forward") == 2 * 3 * block
    assert counted.bytes("all_gather", phase="backward") == 2 * 3 * block
    assert counted.bytes("reduce_scatter", phase="backward") == 2 * 3 * block


# --- unequal pieces --------------------------------------------------------------------------------------


def test_pieces_follow_one_rule():
    assert cal_split_sizes(10, 4) == [3, 3, 2, 2] and cal_split_sizes(3, 4) == [1, 1, 1, 0]


@ranks(3)
def test_any_pair_of_dimensions_with_unequal_pieces(world):
    for shape in ((5, 7, 4), (5, 4, 7, 3)):
        whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        for scatter, gather in permutations(range(len(shape)), 2):
            lengths, pieces = (cal_split_sizes(shape[dim], 3) for dim in (gather, scatter))
            mine = whole.split(lengths, gather)[world.rank].clone().requires_grad_()
            out = all_to_all(mine, world.group, scatter, gather, shape[gather])
            expected = whole.split(pieces, scatter)[world.rank]
            assert torch.equal(out, expected)
            out.backward(expected * 2)
            assert torch.equal(mine.grad, mine.detach() * 2)


@ranks(3)
def test_split_and_gather_with_gradient_scales(world):
    whole = torch.arange(10.0).view(10, 1)
    sizes = [5, 2, 3]
    for scale, factor in ((None, 1.0), ("up", 3.0), ("down", 1 / 3)):
        leaf = whole.clone().requires_grad_()
        piece = split_forward_gather_backward(leaf, world.group, 0, sizes, scale)
        assert torch.equal(piece, whole.split(sizes)[world.rank])
        piece.backward(piece.detach())
        torch.testing.assert_close(leaf.grad, whole * factor)
        leaf = piece.detach().clone().requires_grad_()
        gathered = gather_forward_split_backward(leaf, world.group, 0, sizes, scale)
        assert torch.equal(gathered, whole)
        gathered.backward(whole)
        torch.testing.assert_close(leaf.grad, leaf.detach() * factor)


@ranks(2)
def test_wrong_pieces_are_refused_with_numbers(world):
    x = torch.zeros(4, 4, 4)
    with pytest.raises(ValueError, match=r"rank \d of 2 holds 4 entries of dimension 1, but its piece of gather_size 11"):
        all_to_all(x, world.group, 2, 1, 11)
    with pytest.raises(ValueError, match="are both 1"):
        all_to_all(x, world.group, 1, -2)
    with pytest.raises(ValueError, match="out of range"):
        all_to_all(x, world.group, 5, 1)
    with pytest.raises(ValueError, match=r"split_sizes \[1, 2\] must be one size for each of 2 ranks and sum up to 4"):
        split_forward_gather_backward(x, world.group, 0, [1, 2])
    with pytest.raises(ValueError, match="grad_scale 'sideways'"):
        split_forward_gather_backward(x, world.group, 0, None, "sideways")


class FixedTotal(GatherSizeCalculator):
    def __init__(self, total):
        self.total = total

    def calculate(self, *args, **kwargs):
        return self.total


def local_attention(q, k, v, *args, **kwargs):
    """Causal attention of [S, b, n, d], joined to [S, b, n d]."""
    context = RingContext(None, 0, SequenceLayout(q.shape[0]), OPTIONS)
    return sequence_first(ring_attention(*(heads_first(t) for t in (q, k, v)), context)).flatten(2)


def check_unaligned(world, length, heads, calculator, *args):
    tensors = draw(length, heads=heads, groups=heads, batch=1)
    truth = dense(*tensors, SequenceLayout(length), 0.3)
    sizes = cal_split_sizes(length, world.size)
    q, k, v, grad = (sequence_first(t).split(sizes)[world.rank].clone().requires_grad_() for t in tensors)
    module = UlyssesContextAttention(local_attention, world.group, gather_size_calculator=calculator)
    out = module(q, k, v, *args)
    expected = [sequence_first(t).split(sizes)[world.rank] for t in truth]
    assert_near(out.detach(), expected[0].flatten(2))
    for ours, true in zip(torch.autograd.grad(out, (q, k, v), grad.flatten(2)), expected[1:], strict=True):
        assert_near(ours, true)


@ranks(3)
@pytest.mark.parametrize("length", [13, 11, 10])
@pytest.mark.parametrize("heads", [3, 4])
def test_unequal_lengths_and_heads(world, length, heads):
    check_unaligned(world, length, heads, FixedTotal(length))
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    check_unaligned(world, length, heads, DynamicGatherSizeCalculator(), mask)


@ranks(2)
def test_two_ranks_with_lengths_that_shrink(world):
    for length in (13, 11, 10, 3):
        check_unaligned(world, length, 3, FixedTotal(length))


@ranks(4)
def test_four_ranks_with_lengths_that_shrink(world):
    for length in (13, 11, 10, 5):
        check_unaligned(world, length, 6, FixedTotal(length))


@ranks(1)
def test_one_rank_changes_nothing(world):
    check_unaligned(world, 13, 3, FixedTotal(13))
    x = torch.randn(5, 4, 3, 2)
    assert torch.equal(all_to_all(x, world.group, 2, 0, 5), x) and torch.equal(all_to_all(x, world.group, 1, 2), x)
    leaf = torch.randn(4, 2, requires_grad=True)
    for function in (split_forward_gather_backward, gather_forward_split_backward):
        assert torch.equal(function(leaf, world.group, 0), leaf)


@ranks(2)
def test_documented_wrapper_with_equal_pieces_and_grouped_heads(world):
    layout = SequenceLayout(S, ulysses=2)
    module = UlyssesContextAttention(local_attention, world.group)

    def attention(q, k, v):
        out = module(*(sequence_first(t) for t in (q, k, v)))
        return heads_first(out.unflatten(2, (q.shape[1], -1)))

    assert_parity(attention, layout, world.rank, groups=1)


@ranks(2)
def test_ranks_that_disagree_on_the_total_get_an_error(world):
    q = torch.randn(3, 1, 2, 8)
    module = UlyssesContextAttention(local_attention, world.group, gather_size_calculator=FixedTotal(6 - world.rank))
    with pytest.raises(ValueError, match=r"rank 0: tokens \(6,\), query \(1, 2, 8\).*rank 1: tokens \(5,\)"):
        module(q, q, q)


def test_dynamic_size_reads_masks_only():
    calculate = DynamicGatherSizeCalculator().calculate
    assert calculate(torch.zeros(1, 1, 5, 7)) == 7 and calculate(attention_mask=torch.zeros(5, 9)) == 9
    assert calculate() is None and calculate("causal") is None
    template = torch.zeros(2048, 2048, dtype=torch.bool)
    template.is_compressed_causal_mask = True
    assert calculate(template) is None


def test_segments_of_gathered_keys_are_sorted_chunks():
    layout = SequenceLayout(16, ring=2)
    chunks = sorted(segment for rank in range(2) for segment in layout.segments(rank))
    assert chunks == [Segment(0, 4), Segment(4, 8), Segment(8, 12), Segment(12, 16)]
    tiles = plan_tiles(layout.segments(1), tuple(chunks), layout.rule())
    assert [(tile.rows, tile.keys) for tile in tiles if tile.visible.is_full][0] == (slice(0, 8), slice(0, 4))
    assert positions_of(tuple(chunks)).tolist() == list(range(16))
