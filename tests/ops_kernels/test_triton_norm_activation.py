"""Norm and activation kernels in Triton, under the interpreter, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.triton_interpreter import triton_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 3, 100), (7, 16)]


def normal(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def ran_triton(*names):
    from mindspeed.ops import backend_report

    report = backend_report(torch.get_default_device().type)
    assert {name: report[name].kernel for name in names} == dict.fromkeys(names, "triton"), report


@triton_interpreter("rms_norm=triton")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, weight_dtype, shape):
    from mindspeed.ops.rms_norm import _reference, rms_norm
    from mindspeed.testing.operators import assert_operator_accurate

    weight = normal(shape[-1], dtype=dtype if weight_dtype == "same" else torch.float32)
    assert_operator_accurate(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: _reference(x, w, 1e-5)[0], normal(*shape, dtype=dtype), weight
    )
    ran_triton("rms_norm", "rms_norm_backward")


@triton_interpreter("rms_norm=triton")
def test_rms_norm_of_strided_input():
    from mindspeed.ops.rms_norm import _reference, rms_norm
    from mindspeed.testing.operators import assert_operator_accurate

    x = torch.randn(5, 2, 33).transpose(0, 1).requires_grad_()
    assert_operator_accurate(rms_norm, lambda x, w: _reference(x, w, 1e-6)[0], x, normal(33))


@triton_interpreter("swiglu=triton")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype, shape):
    from mindspeed.ops import swiglu as module
    from mindspeed.testing.operators import assert_operator_accurate

    x = normal(*shape, dtype=dtype)
    assert_operator_accurate(module.swiglu, lambda x: module._reference(x, -1), x)
    assert_operator_accurate(module.bias_swiglu, module._reference_bias, x, normal(shape[-1], dtype=dtype))
    assert_operator_accurate(module.weighted_swiglu, module._reference_weighted, x, normal(*shape[:-1], 1))
    ran_triton("swiglu", "swiglu_backward", "bias_swiglu", "bias_swiglu_backward")
    ran_triton("swiglu_weighted", "swiglu_weighted_backward")


@triton_interpreter("swiglu=triton")
def test_swiglu_longer_than_one_block_of_columns():
    from mindspeed.ops.swiglu import _reference, swiglu
    from mindspeed.testing.operators import assert_operator_accurate

    assert_operator_accurate(swiglu, lambda x: _reference(x, -1), normal(2, 2 * 1500))
