"""Sizes of zero in every place: results of the right shape, gradients of zero, nothing that fails."""

import itertools

import pytest
import torch

from mindspeed.ops import moe_routing_map
from mindspeed.ops._registry import backends
from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy
from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm
from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm
from mindspeed.ops.ffn import npu_ffn
from mindspeed.ops.gmm import npu_gmm, npu_gmm_v2
from mindspeed.ops.layer_norm import layer_norm
from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16, npu_matmul_add_fp32
from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute
from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update
from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding
from mindspeed.ops.quant_gmm import npu_quant_gmm
from mindspeed.ops.rms_norm import rms_norm
from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax
from mindspeed.ops.sort_chunks import sort_chunks
from mindspeed.ops.swiglu import bias_swiglu, swiglu, weighted_swiglu
from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm

SHAPES = [(0, 6), (3, 0), (0,), (2, 0, 4), (0, 0)]


@pytest.fixture(params=["auto", "ref"], autouse=True)
def body(request):
    with backends(f"*={request.param}"):
        yield


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def backward(*results: torch.Tensor) -> None:
    sum(value.sum() for value in results).backward()


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 9, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape):
    x, weight, bias = leaf(*shape), leaf(shape[-1]), leaf(shape[-1])
    for y in (rms_norm(x, weight), layer_norm(x, weight, bias)):
        assert y.shape == shape
        backward(y)
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[-1])) and torch.equal(bias.grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("operator", [npu_dropout_add_rms_norm, npu_dropout_add_layer_norm])
def test_dropout_add_norms(operator, p, shape):
    x, residual, weight, bias, columns = leaf(*shape), leaf(*shape), leaf(shape[-1]), leaf(shape[-1]), leaf(shape[-1])
    rows = leaf(*shape[:-1])
    y, pre, mask = operator(x, residual, weight, bias, p, 1e-5, rows, columns, prenorm=True, return_dropout_mask=True)
    backward(y, pre)
    assert y.shape == pre.shape == mask.shape == shape
    assert torch.equal(columns.grad, torch.zeros(shape[-1])) and torch.equal(rows.grad, torch.zeros(shape[:-1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape):
    x, bias, weights = leaf(*shape), leaf(shape[-1]), leaf(*shape[:-1], 1)
    half = (*shape[:-1], shape[-1] // 2)
    for y in (swiglu(x), bias_swiglu(x, bias), weighted_swiglu(x, weights)):
        assert y.shape == half
        backward(y)
    assert torch.equal(bias.grad, torch.zeros(shape[-1])) and torch.equal(weights.grad, torch.zeros(*shape[:-1], 1))
    if len(shape) > 1:
        for mask, causal in itertools.product((None, torch.zeros(shape, dtype=torch.bool)), (False, True)):
            y = scaled_masked_softmax(x, mask, 0.5, causal)
            assert y.shape == shape
            backward(y)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 4), (0, 3, 1)])
def test_losses(shape):
    logits = leaf(*shape)
    loss = vocab_parallel_cross_entropy(logits, torch.zeros(shape[:-1], dtype=torch.int64))
    backward(loss)
    assert loss.shape == shape[:-1] and logits.grad.shape == shape


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize(
    ("shape", "table"),
    [
        ((0, 2, 3, 6), (1, 1, 1, 6)),
        ((4, 0, 3, 6), (4, 1, 1, 6)),
        ((4, 2, 0, 6), (4, 1, 1, 6)),
        ((4, 2, 3, 0), (4, 1, 1, 0)),
        ((4, 2, 3, 6), (4, 1, 1, 0)),
    ],
)
def test_rotary(shape, table, mode):
    x, cos, sin = leaf(*shape), leaf(*table), leaf(*table)
    y = npu_rotary_position_embedding(x, cos, sin, mode)
    backward(y)
    assert y.shape == shape and torch.equal(cos.grad, torch.zeros(table)) and torch.equal(sin.grad, torch.zeros(table))
    assert table[-1] > 0 or torch.equal(y, x)


@pytest.mark.parametrize(("m", "k", "n", "g"), itertools.product((0, 4), (0, 8), (0, 8), (0, 2)))
def test_grouped_products(m, k, n, g):
    x, weight, stored, bias = leaf(m, k), leaf(g, k, n), leaf(g, n, k), leaf(g, n)
    ends = [m // 2, m][:g]
    sizes = [m // 2, m - m // 2][:g]
    y = npu_gmm(x, weight, bias=bias, group_list=ends)
    for result in (y, npu_gmm_v2(x, stored.transpose(1, 2), bias=bias, group_list=sizes)):
        assert result.shape == (m, n)
        backward(result)
    assert k > 0 or torch.equal(
        y, bias.repeat_interleave(torch.tensor(sizes, dtype=torch.int64), 0) if g else torch.zeros(m, n)
    )
    assert weight.grad.shape == (g, k, n) and torch.equal(bias.grad[..., :1], torch.tensor(sizes).view(g, 1)[:, :n] * 2.0)
    dw = npu_gmm(torch.randn(k, m), torch.randn(m, n), group_list=ends, group_type=2)
    assert torch.equal(dw, torch.zeros(g, k, n)) if m == 0 else dw.shape == (g, k, n)
    grad = torch.ones(g, k, n)
    npu_groupmatmul_add_fp32(torch.randn(m, k), torch.randn(m, n), ends, grad)
    assert m > 0 or torch.equal(grad, torch.ones(g, k, n))
    for operator, dtype in ((npu_matmul_add_fp32, torch.float32), (npu_matmul_add_fp16, torch.bfloat16)):
        grad = torch.ones(n, k, dtype=dtype)
        operator(torch.randn(m, 2, k), torch.randn(m, 2, n), grad)
        assert m > 0 or torch.equal(grad, torch.ones(n, k, dtype=dtype))


@pytest.mark.parametrize(("m", "k", "n", "g"), itertools.product((0, 4), (0, 8), (0, 8), (0, 2)))
def test_quantised_products(m, k, n, g):
    ends = [m // 2, m][:g]
    bias = torch.ones(g, n, dtype=torch.int32)
    y = npu_quant_gmm(int8(m, k), int8(g, k, n), torch.ones(g, n), group_list=ends, bias=bias, per_token_scale=torch.ones(m))
    assert y.shape == (m, n) and (k > 0 or bool((y == (1 if g else 0)).all()))
    half = {"antiquant_scale": torch.ones(g, n).half(), "bias": torch.ones(g, n).half(), "group_list": ends}
    y = npu_weight_quant_gmm(torch.randn(m, k).half(), int8(g, k, n), **half)
    assert y.shape == (m, n) and (k > 0 or bool((y == (1 if g else 0)).all()))


@pytest.mark.parametrize(("m", "k", "n"), itertools.product((0, 4), (0, 8), (0, 6)))
@pytest.mark.parametrize("experts", [None, 2])
def test_networks(m, k, n, experts):
    lead, tokens = ((), {}) if experts is None else ((experts,), {"expert_tokens": [m // 2, m - m // 2]})
    y = npu_ffn(
        torch.randn(m, k), torch.randn(*lead, k, n), torch.randn(*lead, n, 3), "gelu", bias2=torch.ones(*lead, 3), **tokens
    )
    assert y.shape == (m, 3) and (n > 0 or bool((y == 1).all()))
    scales = {"scale": torch.ones(*(lead or (1,))), "deq_scale1": torch.ones(*lead, n), "deq_scale2": torch.ones(*lead, 3)}
    assert npu_ffn(int8(m, k), int8(*lead, k, n), int8(*lead, n, 3), "relu", **scales, **tokens).shape == (m, 3)


@pytest.mark.parametrize(("t", "k", "h"), itertools.product((0, 4), (0, 2), (0, 3)))
def test_token_permutation(t, k, h):
    tokens, probs = leaf(t, h), leaf(t, k)
    permuted, sorted_indices = npu_moe_token_permute(tokens, torch.randint(0, 3, (t, k)))
    out = npu_moe_token_unpermute(permuted, sorted_indices, probs)
    backward(out)
    assert permuted.shape == (t * k, h) and out.shape == (t, h)
    assert tokens.grad.shape == (t, h) and probs.grad.shape == (t, k)
    for options in ({}, {"num_out_tokens": t * k, "drop_and_pad": True}):
        permuted, permuted_probs, row_map = moe_routing_map.permute(tokens, torch.ones(t, k).bool(), probs, **options)
        backward(moe_routing_map.unpermute(permuted, row_map, (t, h), probs), permuted_probs)
        assert permuted.shape == (t * k, h) and permuted_probs.shape == (t * k,)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
def test_chunks(shape):
    x = leaf(*shape)
    y = sort_chunks(x, torch.tensor([shape[0] // 2, shape[0] - shape[0] // 2]), torch.tensor([1, 0]))
    backward(y)
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize(("s", "b", "h"), [(0, 2, 8), (3, 0, 8), (3, 2, 0)])
@pytest.mark.parametrize("lengths", [[], [0], [1, 0, 2]])
def test_merge(s, b, h, lengths):
    out, statistics = torch.randn(s, b, h), torch.rand(b, 2, s, 8)
    merged = npu_ring_attention_update(out, statistics, statistics, out, statistics, statistics)
    assert [value.shape for value in merged] == [out.shape, statistics.shape, statistics.shape]
    statistics, fitting = torch.rand(s, b, 8), lengths if sum(lengths) <= s else [0]
    merged = npu_ring_attention_update(out, statistics, statistics, out, statistics, statistics, fitting, "TND")
    assert [value.shape for value in merged] == [out.shape, statistics.shape, statistics.shape]
