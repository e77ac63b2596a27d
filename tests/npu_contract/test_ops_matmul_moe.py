"""Rotary, softmax, dropout-norm, grouped products and token permutation on the NPU: kernels launched, gradients."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HELPERS = (
    "aclnnInplaceOne", "aclnnInplaceZero", "aclnnInplaceCopy", "aclnnInplaceFillScalar", "aclnnCast", "aclnnArange", "aclnnGeTensor",
    "aclnnInplaceMaskedFillScalar",
)  # fmt: skip


def tensor(*shape, dtype=BF16, grad=False):
    return torch.zeros(*shape, dtype=dtype, device="npu").requires_grad_(grad)


def launched(calls):
    return [name for name in calls.names if name not in HELPERS]


def backward(calls, y):
    dy = torch.zeros_like(y)
    calls.reset()
    y.backward(dy)
    return launched(calls)


def kernel_of(name):
    from mindspeed.ops import backend_report

    return backend_report("npu")[name].kernel


# ---- rotary ------------------------------------------------------------------------------------------------------------------


@npu_contract()
@pytest.mark.parametrize("mode", [0, 1])
def test_rotary_keeps_x_only_for_gradients_of_the_tables(calls, mode):
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding as rotary

    x, cos, sin = tensor(8, 2, 4, 16, grad=True), tensor(8, 1, 1, 16, dtype=FP32), tensor(8, 1, 1, 16, dtype=FP32)
    calls.reset()
    y = rotary(x, cos, sin, mode)
    assert launched(calls) == ["aclnnRotaryPositionEmbeddingV2"]
    assert [argument.dtype for argument in calls.named("aclnnRotaryPositionEmbeddingV2")[0].tensors] == ["bfloat16"] * 4
    assert "aclnnRotaryPositionEmbeddingV2" in backward(calls, y)
    assert (x.grad.shape, x.grad.dtype) == (x.shape, BF16)

    cos.requires_grad_()
    assert "aclnnRotaryPositionEmbeddingGrad" in backward(calls, rotary(x, cos, sin, mode))
    assert (cos.grad.shape, cos.grad.dtype) == (cos.shape, FP32)


@npu_contract()
def test_rotary_of_part_of_the_head_and_of_other_layouts(calls):
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding as rotary

    x = tensor(8, 2, 4, 16, grad=True)
    y = rotary(x, tensor(8, 1, 1, 8), tensor(8, 1, 1, 8), 0)
    assert y.shape == x.shape
    assert calls.named("aclnnRotaryPositionEmbeddingV2")[0].tensors[0].shape == (8, 2, 4, 8)
    calls.reset()
    y = rotary(x, tensor(8, 2, 1, 16), tensor(8, 2, 1, 16), 1)  # interleaved pairs want one position axis
    assert kernel_of("rotary") == "ref" and y.shape == x.shape
    assert calls.named("aclnnRotaryPositionEmbeddingV2") == []


# ---- softmax -----------------------------------------------------------------------------------------------------------------


@npu_contract()
@pytest.mark.parametrize(("masked", "causal"), [(True, False), (False, True), (True, True)])
def test_scaled_masked_softmax(calls, masked, causal):
    from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax

    x = tensor(2, 3, 32, 64, grad=True)
    mask = torch.zeros(2, 1, 32, 64, dtype=torch.bool, device="npu") if masked else None
    calls.reset()
    y = scaled_masked_softmax(x, mask, 0.5, causal)
    assert calls.names.count("ScaledMaskedSoftmax") == 1
    assert ("aclnnAll" in calls.names) == masked  # rows without an entry left are cleared
    assert (y.shape, y.dtype) == (x.shape, BF16)
    assert backward(calls, y) == ["ScaledMaskedSoftmaxGrad"]
    assert x.grad.shape == x.shape


@npu_contract()
def test_softmax_of_sizes_that_the_kernel_refuses_runs_the_plain_form(calls):
    from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax

    scaled_masked_softmax(tensor(2, 3, 16, 48), None, 0.5, True)
    assert "ScaledMaskedSoftmax" not in calls.names
    assert kernel_of("scaled_masked_softmax") == "ref"


# ---- dropout, add, norm ------------------------------------------------------------------------------------------------------


@npu_contract()
def test_plain_add_rms_norm_is_one_kernel(calls):
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm

    x, residual, weight = tensor(2, 4, 16, grad=True), tensor(2, 4, 16, grad=True), tensor(16, grad=True)
    calls.reset()
    y, pre = npu_dropout_add_rms_norm(x, residual, weight, None, 0.0, 1e-5, prenorm=True)
    assert launched(calls) == ["aclnnAddRmsNorm"]
    assert (y.dtype, pre.dtype, pre.shape) == (BF16, BF16, x.shape)
    calls.reset()
    (y + pre).backward(torch.zeros_like(y))
    assert calls.names.count("aclnnRmsNormGrad") == 1
    assert all(value.grad.shape == value.shape for value in (x, residual, weight))


@npu_contract()
@pytest.mark.parametrize(("kind", "norm"), [("rms", "aclnnRmsNorm"), ("layer", "aclnnLayerNorm")])
def test_dropout_add_norm_makes_its_mask_again_in_backward(calls, kind, norm):
    from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm

    operator = npu_dropout_add_rms_norm if kind == "rms" else npu_dropout_add_layer_norm
    x, residual = tensor(2, 4, 16, grad=True), tensor(2, 4, 16, dtype=FP32, grad=True)
    weight, bias = tensor(16, dtype=FP32, grad=True), tensor(16, dtype=FP32, grad=True)
    scales = {"rowscale": tensor(2, 4, grad=True), "layerscale": tensor(16, dtype=FP32, grad=True)}
    calls.reset()
    y, mask = operator(x, residual, weight, bias, 0.1, 1e-5, return_dropout_mask=True, **scales)
    for name in ("aclnnDropoutGenMaskV2", "aclnnDropoutDoMask"):
        assert calls.names.count(name) == 2  # forward, and once more for the mask that was asked for
    assert calls.names.count(norm) == 1
    assert (mask.dtype, mask.shape) == (torch.bool, x.shape)
    names = backward(calls, y)
    assert names.count("aclnnDropoutGenMaskV2") == names.count("aclnnDropoutDoMask") == 1
    for value in (x, residual, weight, bias, *scales.values()):
        assert (value.grad.shape, value.grad.dtype) == (value.shape, value.dtype)


# ---- grouped products --------------------------------------------------------------------------------------------------------


@npu_contract()
@pytest.mark.parametrize("transposed", [False, True])
def test_gmm_gives_the_gradients_that_torch_npu_lacks(calls, transposed):
    from mindspeed.ops.gmm import npu_gmm

    x = tensor(8, 16, grad=True)
    stored = tensor(2, 32, 16, grad=True) if transposed else tensor(2, 16, 32, grad=True)
    weight = stored.transpose(1, 2) if transposed else stored
    calls.reset()
    y = npu_gmm(x, weight, group_list=[3, 8])
    assert calls.names.count("aclnnGroupedMatmulV5") == 1
    assert (y.shape, y.dtype) == ((8, 32), BF16)
    assert backward(calls, y).count("aclnnGroupedMatmulV5") == 2
    assert (x.grad.shape, stored.grad.shape, stored.grad.is_contiguous()) == (x.shape, stored.shape, True)


@npu_contract()
def test_gmm_with_bias_and_sizes_on_the_device(calls):
    from mindspeed.ops.gmm import npu_gmm_v2

    x, weight, bias = tensor(8, 16, grad=True), tensor(2, 16, 32, grad=True), tensor(2, 32, dtype=FP32, grad=True)
    y = npu_gmm_v2(x, weight, bias=bias, group_list=torch.tensor([3, 5]).to("npu"))
    (call,) = calls.named("aclnnGroupedMatmulV5")
    assert [argument.shape for argument in call.tensors] == [(8, 16), (2, 16, 32), (2, 32), (2,), (8, 32)]
    y.backward(torch.zeros_like(y))
    assert (bias.grad.shape, bias.grad.dtype) == ((2, 32), FP32)


@npu_contract()
def test_gmm_group_type_2(calls):
    from mindspeed.ops.gmm import npu_gmm

    y = npu_gmm(tensor(8, 16).t(), tensor(8, 32), group_list=[3, 8], group_type=2)
    assert launched(calls) == ["aclnnGroupedMatmulV5"]
    assert y.shape == (2, 16, 32)


@npu_contract()
def test_gmm_fusion_adds_to_main_grad(calls):
    from mindspeed.ops.gmm import npu_gmm

    x, weight = tensor(8, 16, grad=True), tensor(2, 16, 32, grad=True)
    weight.main_grad = tensor(32, 32, dtype=FP32)
    weight.grad_added_to_main_grad = False
    y = npu_gmm(x, weight, group_list=[3, 8], gemm_fusion=True, original_weight=weight)
    names = backward(calls, y)
    assert (names.count("aclnnGroupedMatmulAdd"), names.count("aclnnGroupedMatmulV5")) == (1, 1)
    assert weight.grad_added_to_main_grad and x.grad.shape == x.shape


@npu_contract()
@pytest.mark.parametrize("with_atb", [False, True])
def test_matmul_add(calls, with_atb):
    from unittest import mock

    from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16, npu_matmul_add_fp32

    x, dy, grad = tensor(2, 4, 16), tensor(2, 4, 32), tensor(32, 16, dtype=FP32)
    npu_matmul_add_fp32(x.float(), dy.float(), grad)  # imports the body; float32 operands run the plain form
    assert kernel_of("matmul_add_") == "ref"
    from mindspeed.ops.kernels.npu import matmul_add

    product = mock.Mock() if with_atb else None  # ATB kernels cannot run here: only what they are given is checked
    calls.reset()
    with mock.patch.object(matmul_add, "atb_product", lambda: product):
        npu_matmul_add_fp32(x, dy, grad)
    assert kernel_of("matmul_add_") == "npu"
    if with_atb:
        schema = [argument.name for argument in torch.ops.atb._npu_matmul_add_fp32.default._schema.arguments]
        given = dict(zip(schema, (tuple(value.shape) for value in product.call_args.args), strict=True))
        assert given == {"x": (8, 32), "weight": (8, 16), "C": (32, 16)}
    else:
        assert launched(calls) == ["aclnnGroupedMatmulAdd"]
    npu_matmul_add_fp16(x, dy, tensor(32, 16))
    assert kernel_of("matmul_add_") == "ref"


@npu_contract()
def test_atb_is_found_when_its_library_loads(calls):
    from mindspeed.ops.kernels.npu.matmul_add import atb_product

    assert atb_product() is torch.ops.atb._npu_matmul_add_fp32


# ---- token permutation -------------------------------------------------------------------------------------------------------


@npu_contract()
def test_permute_and_unpermute(calls):
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute

    tokens, probs = tensor(8, 16, grad=True), tensor(8, 2, dtype=FP32, grad=True)
    calls.reset()
    permuted, order = npu_moe_token_permute(tokens, torch.zeros(8, 2, dtype=torch.int64, device="npu"))
    assert launched(calls) == ["aclnnMoeTokenPermute"]
    assert (permuted.shape, order.shape, order.dtype) == ((16, 16), (16,), torch.int32)
    calls.reset()
    out = npu_moe_token_unpermute(permuted, order, probs)
    assert launched(calls) == ["aclnnMoeTokenUnpermute"]
    assert backward(calls, out) == ["aclnnMoeTokenUnpermuteGrad", "aclnnMoeTokenPermuteGrad"]
    assert (tokens.grad.shape, probs.grad.shape, probs.grad.dtype) == (tokens.shape, probs.shape, FP32)


@npu_contract()
def test_dropped_tokens_and_routing_maps_do_not_wait_for_the_device(calls):
    from mindspeed.ops.moe_routing_map import permute, unpermute
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute

    tokens, probs = tensor(8, 16, grad=True), tensor(8, 2, dtype=FP32, grad=True)
    permuted, order = npu_moe_token_permute(tokens, torch.zeros(8, 2, dtype=torch.int32, device="npu"), num_out_tokens=12)
    npu_moe_token_unpermute(permuted, order, probs).sum().backward()
    assert (permuted.shape, tokens.grad.shape, probs.grad.shape) == ((12, 16), (8, 16), (8, 2))

    tokens, weights = tensor(8, 16, grad=True), tensor(8, 4, dtype=FP32, grad=True)
    routing = torch.ones(8, 4, dtype=torch.bool, device="npu")
    permuted, permuted_probs, row_map = permute(tokens, routing, weights, num_out_tokens=16)
    assert (permuted.shape, permuted_probs.shape) == ((16, 16), (16,))
    out = unpermute(permuted * permuted_probs.unsqueeze(1), row_map, (8, 16))
    out.sum().backward()
    assert (out.dtype, tokens.grad.shape, weights.grad.shape) == (FP32, (8, 16), (8, 4))
    assert not [name for name in calls.names if "Nonzero" in name]
