"""Every kernel of this device against dense attention in float64, and tiles against the whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed.core.attention import (
    CAUSAL,
    FULL,
    Accumulator,
    Dropout,
    GradientSum,
    Scoring,
    Visibility,
    attend,
    attend_backward,
    merge,
    merge_fused,
)
from mindspeed.core.attention.bias import AlibiBias, MaskBias, SumOfBiases
from mindspeed.core.attention.cpu_kernel import CpuKernel
from mindspeed.core.attention.dispatch import kernels_for
from mindspeed.core.attention.math_kernel import MathKernel
from mindspeed.core.attention.npu_kernel import NpuKernel

KERNELS = [CpuKernel(), MathKernel(), MathKernel(max_scores=64), NpuKernel()]  # the last one on the operator's CPU body
BAND = Visibility(past=5, future=2)


def inputs(queries, keys, *, heads=4, groups=2, dim=8, value_dim=None, dtype=torch.float32, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, value_dim or dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(q, k, v, scoring):
    """Attention in float64 with every score in memory; rows that see nothing give 0 and -inf."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = scoring.scale * q @ k.transpose(-1, -2)
    if scoring.bias is not None:
        scores = scores + scoring.bias.double()
    hidden = scoring.visible.mask(range(q.shape[2]), range(k.shape[2]), q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    blind = torch.isinf(lse).unsqueeze(-1)
    return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0) @ v, lse


def dense_gradients(q, k, v, scoring, grad_out):
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out, _ = dense(*leaves, scoring)
    return torch.autograd.grad(out, leaves, grad_out.double())


def assert_near(ours, truth, dtype):
    """fp32: 1e-5 of the largest entry; bf16: 1e-2 in the Frobenius norm."""
    truth = truth.double()
    if dtype == torch.float32:
        assert (ours.double() - truth).abs().max() <= 1e-5 * max(1.0, truth.abs().max().item())
    else:
        assert (ours.double() - truth).norm() <= 1e-2 * truth.norm() + 1e-6


@pytest.mark.parametrize("kernel", KERNELS, ids=["cpu", "math", "math-chunked", "npu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (7, 7), (33, 33), (100, 100), (128, 128), (33, 100), (100, 33)], ids=lambda value: str(value)
)
def test_kernels_agree_with_dense_attention(kernel, dtype, groups, queries, keys):
    q, k, v = inputs(queries, keys, groups=groups, dtype=dtype)
    cases = [FULL, BAND, Visibility(past=3, future=0, shift=-2)] + ([CAUSAL] if queries == keys else [])
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(1, 4, queries, keys, generator=torch.Generator().manual_seed(2)).to(dtype).float()  # NPU rounds it
    for visible, use_bias in itertools.product(cases, (False, True)):
        scoring = Scoring(0.3, visible, bias if use_bias else None)
        out, lse, state = kernel.forward(q, k, v, scoring)
        truth, truth_lse = dense(q, k, v, scoring)
        assert_near(out, truth, dtype)
        seen = ~torch.isinf(truth_lse)
        assert torch.equal(torch.isinf(lse), ~seen)
        torch.testing.assert_close(lse[seen].double(), truth_lse[seen], atol=2e-4 if dtype == torch.bfloat16 else 1e-5, rtol=0)
        ours = kernel.backward(grad_out, q, k, v, truth.to(dtype), truth_lse.float(), scoring, state)
        for gradient, expected in zip(ours, dense_gradients(q, k, v, scoring, grad_out), strict=True):
            assert_near(gradient, expected, dtype)


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=["cpu", "math"])
@pytest.mark.parametrize("value_dim", [4, 12])
def test_values_may_have_another_head_size(kernel, value_dim):
    q, k, v = inputs(20, 20, value_dim=value_dim)
    scoring = Scoring(0.35, CAUSAL)
    out, lse, state = kernel.forward(q, k, v, scoring)
    truth, truth_lse = dense(q, k, v, scoring)
    assert_near(out, truth, torch.float32)
    grad_out = torch.randn_like(out)
    gradients = kernel.backward(grad_out, q, k, v, out, lse, scoring, state)
    for gradient, expected in zip(gradients, dense_gradients(q, k, v, scoring, grad_out), strict=True):
        assert gradient.shape == expected.shape
        assert_near(gradient, expected, torch.float32)


@pytest.mark.parametrize("kernel", [*KERNELS[:2], KERNELS[3]], ids=["cpu", "math", "npu"])
def test_rows_that_see_nothing_are_zero_without_nan(kernel):
    q, k, v = inputs(10, 10)
    bias = torch.zeros(10, 10)
    bias[3], bias[9] = float("-inf"), float("-inf")
    for scoring in (Scoring(0.3, FULL, bias), Scoring(0.3, Visibility(past=2, future=-1))):
        out, lse, state = kernel.forward(q, k, v, scoring)
        blind = torch.isinf(dense(q, k, v, scoring)[1])
        assert blind.any()
        assert torch.equal(torch.isinf(lse), blind) and (out[blind] == 0).all()
        gradients = kernel.backward(torch.ones_like(out), q, k, v, out, lse, scoring, state)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert (gradients[0][blind] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 24), max_size=4),
    past=st.none() | st.integers(0, 12),
    future=st.none() | st.integers(-2, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_split_of_the_keys_gives_the_whole(cuts, past, future, dtype):
    q, k, v = inputs(24, 24, dtype=dtype, batch=1)
    edges = [0, *sorted(cuts), 24]
    total = Accumulator(q, v.shape[-1])
    whole = Scoring(0.3, Visibility(past, future))
    tiles = [(slice(a, b), Scoring(0.3, Visibility(past, future, shift=a))) for a, b in itertools.pairwise(edges)]
    for keys, scoring in tiles:
        out, lse, _ = attend(q, k[:, :, keys], v[:, :, keys], scoring)
        total.add(out, lse)
    truth, truth_lse = dense(q, k, v, whole)
    assert_near(total.out, truth, dtype)
    grad_out = torch.ones_like(q)
    gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (q, k, v)]
    for keys, scoring in tiles:
        dq, dk, dv = attend_backward(grad_out, q, k[:, :, keys], v[:, :, keys], total.out, total.lse, scoring)
        gradients[0] += dq
        gradients[1][:, :, keys] += dk
        gradients[2][:, :, keys] += dv
    for gradient, expected in zip(gradients, dense_gradients(q, k, v, whole, grad_out), strict=True):
        assert_near(gradient, expected, dtype)


def test_rows_can_be_updated_in_part():
    q, k, v = inputs(8, 8)
    total = Accumulator(q, 8)
    total.add(*attend(q, k, v, Scoring(0.3, CAUSAL))[:2])
    more_k, more_v = torch.randn_like(k), torch.randn_like(v)
    rows = slice(4, 8)
    total.add(*attend(q[:, :, rows], more_k, more_v, Scoring(0.3))[:2], rows=rows)
    bias = torch.zeros(8, 16)
    bias[:, :8].masked_fill_(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf"))
    bias[:4, 8:] = float("-inf")
    truth, _ = dense(q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), Scoring(0.3, FULL, bias))
    assert_near(total.out, truth, torch.float32)


def test_one_tile_stays_as_it_is_and_more_are_summed_wide():
    """Rule 6 of the specification, without a pass over memory where there is nothing to sum."""
    like = torch.randn(1, 2, 5, 4, dtype=torch.bfloat16)
    first, second = torch.randn_like(like), torch.randn_like(like[:, :, 2:])
    total, gradient = Accumulator(like, 4), GradientSum(like)
    assert gradient.total.dtype == torch.float32 and not gradient.total.any() and not total.out.any()
    total = Accumulator(like, 4)
    total.add(first, torch.zeros(1, 2, 5))
    gradient.add(first.clone(), (slice(None), slice(None), slice(0, 5)))
    assert total.out is first and torch.equal(gradient.total, first) and gradient.total.dtype == torch.bfloat16
    total.add(second, torch.zeros(1, 2, 3), rows=slice(2, 5))
    gradient.add(second, (slice(None), slice(None), slice(2, 5)))
    expected = first.float()
    expected[:, :, 2:] += second.float()
    assert gradient.total.dtype == total.out.dtype == torch.float32 and torch.equal(gradient.total, expected)
    expected[:, :, 2:] /= 2
    torch.testing.assert_close(total.out, expected)


@pytest.mark.parametrize("merge", [merge, merge_fused], ids=["plain", "fused"])
def test_merging_with_an_empty_side_changes_nothing(merge):
    out, lse = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3)
    nothing, never = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for first, second in (((out, lse), (nothing, never)), ((nothing, never), (out, lse))):
        merged, merged_lse = merge(*first, *second)
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = merge(nothing, never, nothing, never)
    assert torch.equal(merged, nothing) and torch.equal(merged_lse, never)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fused_merge_is_the_merge(dtype):
    out_a, out_b = (torch.randn(2, 4, 5, 8, dtype=dtype) for _ in range(2))
    lse_a, lse_b = (
        10 * torch.randn(2, 4, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)
    )
    lse_a[0, 1], lse_b[:, :, 2] = float("-inf"), float("-inf")
    out_a[0, 1], out_b[:, :, 2] = 0.0, 0.0  # rows without keys
    expected, ours = merge(out_a, lse_a, out_b, lse_b), merge_fused(out_a, lse_a, out_b, lse_b)
    assert ours[0].dtype == expected[0].dtype == lse_a.dtype
    torch.testing.assert_close(ours[0], expected[0], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(ours[1], expected[1], atol=2e-6, rtol=2e-6)


def test_error_does_not_grow_with_the_number_of_tiles():
    q, k, v = inputs(64, 256, dtype=torch.bfloat16, dim=32, batch=1)
    truth, _ = dense(q, k, v, Scoring(0.18))

    def error(tiles):
        total = Accumulator(q, v.shape[-1])
        for k_part, v_part in zip(k.chunk(tiles, 2), v.chunk(tiles, 2), strict=True):
            total.add(*attend(q, k_part, v_part, Scoring(0.18))[:2])
        return (total.out.double() - truth).norm()

    assert error(32) <= 1.3 * error(1)


def test_dropout_is_served_by_the_reference_and_repeats():
    q, k, v = inputs(40, 40)
    scoring = Scoring(0.3, CAUSAL, dropout=Dropout(0.3, seed=11))
    assert "dropout" in CpuKernel().declines(q, k, v, scoring)
    out, lse, _ = attend(q, k, v, scoring)
    again, *_ = attend(q, k, v, scoring)
    other, *_ = attend(q, k, v, Scoring(0.3, CAUSAL, dropout=Dropout(0.3, seed=12)))
    assert torch.equal(out, again) and not torch.equal(out, other)
    plain, plain_lse, _ = attend(q, k, v, Scoring(0.3, CAUSAL))
    torch.testing.assert_close(lse, plain_lse)
    keep = Dropout(0.3, 11).multipliers(2, 4, range(40), range(40), q).double()
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    repeated = [tensor.repeat_interleave(2, 1) for tensor in leaves[1:]]
    scores = (0.3 * leaves[0] @ repeated[0].transpose(-1, -2)).masked_fill(
        torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf
    )
    truth = (scores.softmax(-1) * keep) @ repeated[1]
    assert_near(out, truth.detach(), torch.float32)
    grad_out = torch.randn_like(out)
    ours = attend_backward(grad_out, q, k, v, out, lse, scoring)
    for gradient, expected in zip(ours, torch.autograd.grad(truth, leaves, grad_out.double()), strict=True):
        assert_near(gradient, expected, torch.float32)


def test_reference_passes_gradcheck():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.scoring, kernel = Scoring(0.4, BAND), MathKernel(max_scores=40)
            out, lse, _ = kernel.forward(q, k, v, ctx.scoring)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            q, k, v, out, lse = ctx.saved_tensors
            return MathKernel(max_scores=40).backward(grad_out, q, k, v, out, lse, ctx.scoring, None)

    leaves = [tensor.double().requires_grad_() for tensor in inputs(6, 6, dim=3, batch=1)]
    assert torch.autograd.gradcheck(Attention.apply, leaves)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_ranges_do_not_reach_a_kernel(queries, keys):
    q, k, v = inputs(queries, keys)
    out, lse, _ = attend(q, k, v, Scoring(1.0))
    assert out.shape == q.shape and (out == 0).all() and torch.isinf(lse).all()
    gradients = attend_backward(out, q, k, v, out, lse, Scoring(1.0))
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 4, 3), (2, 4, 3, 8), (2, 4, 3, 8)), "must be"),
        (((2, 4, 3, 8), (2, 4, 3, 6), (2, 4, 3, 8)), "do not fit"),
        (((2, 4, 3, 8), (2, 3, 3, 8), (2, 3, 3, 8)), "4 query heads are not a multiple of 3"),
    ],
)
def test_impossible_shapes_are_refused(shapes, words):
    with pytest.raises(ValueError, match=words):
        attend(*(torch.zeros(shape) for shape in shapes), Scoring(1.0))


def test_fused_kernel_is_first_on_cpu():
    assert [kernel.name for kernel in kernels_for("cpu")] == ["cpu-flash", "math"]


POSITIONS = torch.arange(12) + 40
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
HIDDEN = torch.rand(12, 12, generator=torch.Generator().manual_seed(4)) < 0.3


def alibi(distance, positions=POSITIONS):
    return AlibiBias(SLOPES, positions, POSITIONS - 6, distance)


@pytest.mark.parametrize("order", ["SBH", "BNSD"])
@pytest.mark.parametrize(
    ("bias", "visible", "pse_type", "sparse_mode"),
    [
        (None, CAUSAL, 1, 2),
        (None, FULL, 1, 0),
        (None, BAND, 1, 4),
        (None, Visibility(past=-2), 1, 1),
        (MaskBias(HIDDEN), FULL, 1, 1),
        (alibi("absolute"), CAUSAL, 2, 2),
        (alibi("root"), BAND, 3, 4),
        (alibi("signed"), CAUSAL, 0, 2),
        (alibi("absolute", POSITIONS.flip(0)), FULL, 0, 0),
        (SumOfBiases((alibi("root"), MaskBias(HIDDEN))), FULL, 3, 1),
        (SumOfBiases((alibi("signed"), MaskBias(HIDDEN), MaskBias(HIDDEN.T))), CAUSAL, 0, 1),
    ],
    ids=["causal", "full", "band", "beside", "mask", "alibi", "root", "signed", "shuffled", "alibi-mask", "signed-masks"],
)
def test_npu_arguments_mean_the_tile(order, bias, visible, pse_type, sparse_mode):
    """The operator's CPU body gives the documented arguments their meaning, so numbers prove them."""
    q, k, v = inputs(12, 12)
    kernel, scoring = NpuKernel(), Scoring(0.3, visible, bias, memory_order=order)
    arguments = kernel._arguments(q, k, scoring, None)
    assert (arguments[13], arguments[12]) == (pse_type, sparse_mode)
    out, lse, state = kernel.forward(q, k, v, scoring)
    whole = None if bias is None else bias(range(12), range(12))
    truth, truth_lse = dense(q, k, v, Scoring(0.3, visible, whole))
    assert_near(out, truth, torch.float32)
    torch.testing.assert_close(lse.double(), truth_lse, atol=1e-5, rtol=0)
    grad_out = torch.randn_like(out)
    expected = dense_gradients(q, k, v, Scoring(0.3, visible, whole), grad_out)
    for gradient, true in zip(kernel.backward(grad_out, q, k, v, out, lse, scoring, state), expected, strict=True):
        assert_near(gradient, true, torch.float32)


def test_npu_dropout_is_the_tile_seed_in_forward_and_backward():
    kernel = NpuKernel()
    q, k, v = inputs(12, 12)
    scoring = Scoring(0.3, CAUSAL, dropout=Dropout(0.4, seed=7))
    out, lse, state = kernel.forward(q, k, v, scoring)
    assert state == (7, 0, 2 * 4 * 12 * 12)
    assert torch.equal(out, kernel.forward(q, k, v, scoring)[0])
    assert not torch.equal(out, kernel.forward(q, k, v, Scoring(0.3, CAUSAL, dropout=Dropout(0.4, seed=8)))[0])
    # out is linear in v, so the gradient of v under the same mask reproduces sum(out * g) = sum(v * dv).
    grad_out = torch.randn_like(out)
    dv = kernel.backward(grad_out, q, k, v, out, lse, scoring, state)[2]
    torch.testing.assert_close((dv * v).sum(), (out * grad_out).sum())


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"dtype": torch.float64}, "float64"), ({"heads": 512, "groups": 1}, "256 heads"), ({"value_dim": 16}, "16 of values")],
)
def test_npu_kernel_declines_what_its_documentation_excludes(changes, words):
    assert words in NpuKernel().declines(*inputs(4, 4, **changes), Scoring(1.0))


def test_strided_views_need_no_copy():
    q, k, v = (torch.randn(16, 2, 4, 8).permute(1, 2, 0, 3) for _ in range(3))
    scoring = Scoring(0.3, CAUSAL)
    assert_near(attend(q, k, v, scoring)[0], dense(q, k, v, scoring)[0], torch.float32)
