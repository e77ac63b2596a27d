"""Rotary, masked softmax and dropout-add-norm kernels in Triton, under the interpreter, against the definitions."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.triton_interpreter import triton_interpreter

DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def ran_triton(*names):
    from mindspeed.ops import backend_report

    report = backend_report(torch.get_default_device().type)
    assert {name: report[name].kernel for name in names} == dict.fromkeys(names, "triton"), report


@triton_interpreter("rotary=triton")
@pytest.mark.parametrize("rotated", [40, 24])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("table", [(7, 1, 1), (1, 2, 1), (7, 2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype, table, mode, rotated):
    from mindspeed.ops.npu_rotary_position_embedding import _reference, npu_rotary_position_embedding
    from mindspeed.testing.operators import assert_operator_accurate

    cos, sin = (normal(*table, rotated, grad=False) for _ in range(2))
    x = normal(7, 2, 3, 40, dtype=dtype)
    assert_operator_accurate(npu_rotary_position_embedding, _reference, x, cos, sin, mode)
    ran_triton("rotary", "rotary_backward")


@triton_interpreter("rotary=triton")
def test_rotary_of_strided_input_and_of_angles_that_want_gradients():
    from mindspeed.ops.npu_rotary_position_embedding import _reference, npu_rotary_position_embedding
    from mindspeed.testing.operators import assert_operator_accurate

    x = torch.randn(3, 2, 5, 8).permute(2, 1, 0, 3).requires_grad_()
    assert_operator_accurate(npu_rotary_position_embedding, _reference, x, normal(5, 1, 1, 8), normal(5, 1, 1, 8), 0)


@triton_interpreter("scaled_masked_softmax=triton")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_shape", [None, (2, 1, 5, 7), (1, 1, 1, 7), (5, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_masked_softmax(dtype, mask_shape, causal):
    from mindspeed.ops.scaled_masked_softmax import _reference, scaled_masked_softmax
    from mindspeed.testing.operators import assert_operator_accurate

    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.4
    if mask is not None:
        mask[..., 1 if mask.shape[-2] > 1 else 0, :] = True  # a row with nothing left
    x = normal(2, 3, 5, 7, dtype=dtype)
    assert_operator_accurate(scaled_masked_softmax, _reference, x, mask, 0.7, causal)
    ran_triton("scaled_masked_softmax", "scaled_masked_softmax_backward")


@triton_interpreter("scaled_masked_softmax=triton")
def test_softmax_with_a_negative_scale_and_three_dimensions():
    from mindspeed.ops.scaled_masked_softmax import _reference, scaled_masked_softmax
    from mindspeed.testing.operators import assert_operator_accurate

    assert_operator_accurate(scaled_masked_softmax, _reference, normal(2, 5, 9), None, -0.5, True)


def norm_arguments(kind, dtype, scales):
    from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm

    operator = npu_dropout_add_rms_norm if kind == "rms" else npu_dropout_add_layer_norm
    x, residual = normal(2, 5, 33, dtype=dtype), normal(2, 5, 33)
    weight, bias = normal(33), normal(33)
    row, layer = (normal(2, 5, dtype=dtype), normal(33)) if scales else (None, None)
    return operator, (x, residual, weight, bias, row, layer)


@triton_interpreter("dropout_add_norm=triton")
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_add_norm(dtype, kind, p, scales):
    from mindspeed.testing.operators import assert_operator_accurate

    operator, inputs = norm_arguments(kind, dtype, scales)
    torch.manual_seed(3)
    mask = operator(*inputs[:4], p, 1e-5, return_dropout_mask=True)[-1]

    def triton(x, residual, weight, bias, row, layer):
        torch.manual_seed(3)  # the same random state, hence the same mask
        return operator(x, residual, weight, bias, p, 1e-5, rowscale=row, layerscale=layer, prenorm=True)

    def textbook(x, residual, weight, bias, row, layer):
        u = x * (mask / (1 - p) if p < 1 else mask).to(x.dtype)
        u = u if row is None else u * row.unsqueeze(-1)
        u = (u if layer is None else u * layer.to(u.dtype)) + residual
        centred = u if kind == "rms" else u - u.mean(-1, keepdim=True)
        y = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias
        return y.to(x.dtype), u

    assert_operator_accurate(triton, textbook, *inputs)
    ran_triton("dropout_add_norm", "dropout_add_norm_backward")


@triton_interpreter("dropout_add_norm=triton")
def test_dropout_keeps_the_right_share_and_never_repeats():
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm

    def masks():
        return npu_dropout_add_rms_norm(torch.ones(64, 100), None, torch.ones(100), None, 0.2, 1e-5, return_dropout_mask=True)[
            1
        ]

    first, second = masks(), masks()
    deviation = (0.2 * 0.8 / first.numel()) ** 0.5
    assert abs(first.double().mean().item() - 0.8) < 4 * deviation
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
