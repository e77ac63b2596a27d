"""Norm and activation operators on the NPU: which torch_npu kernels run, that gradients come."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tensor(*shape, dtype=BF16, grad=False):
    return torch.zeros(*shape, dtype=dtype, device="npu").requires_grad_(grad)


def backward(calls, y):
    """Names launched by the backward of y alone."""
    dy = torch.zeros_like(y)
    calls.reset()
    y.backward(dy)
    return calls.names


@npu_contract()
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rms_norm(calls, dtype):
    from mindspeed.ops.rms_norm import rms_norm

    x, gamma = tensor(4, 3, 16, dtype=dtype, grad=True), tensor(16, dtype=dtype, grad=True)
    calls.reset()
    y = rms_norm(x, gamma)
    assert calls.names == ["aclnnRmsNorm"]
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, dtype, True)
    cast = [] if dtype == FP32 else ["aclnnInplaceCopy"]  # the kernel gives dgamma in float32
    assert backward(calls, y) == ["aclnnRmsNormGrad", *cast]
    assert (x.grad.dtype, gamma.grad.dtype) == (dtype, dtype)
    assert (x.grad.shape, gamma.grad.shape) == (x.shape, gamma.shape)


@npu_contract()
def test_rms_norm_with_a_float32_weight_computes_in_float32(calls):
    from mindspeed.ops.rms_norm import rms_norm

    x, gamma = tensor(4, 16, grad=True), tensor(16, dtype=FP32, grad=True)
    calls.reset()
    y = rms_norm(x, gamma)
    assert y.dtype == BF16
    assert [argument.dtype for argument in calls.named("aclnnRmsNorm")[0].tensors] == ["float32"] * 4
    backward(calls, y)
    assert (x.grad.dtype, gamma.grad.dtype) == (BF16, FP32)


@npu_contract()
@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu(calls, dim):
    from mindspeed.ops.swiglu import swiglu

    x = tensor(4, 16, grad=True)
    calls.reset()
    y = swiglu(x, dim)
    assert calls.names == ["aclnnSwiGlu"]
    assert y.shape == ((4, 8) if dim == -1 else (2, 16))
    assert backward(calls, y) == ["aclnnSwiGluGrad"]
    assert (x.grad.shape, x.grad.dtype) == (x.shape, BF16)


@npu_contract()
def test_swiglu_with_bias_and_with_weights(calls):
    from mindspeed.ops.swiglu import bias_swiglu, weighted_swiglu

    for function, other in ((bias_swiglu, (16,)), (weighted_swiglu, (4, 1))):
        x, second = tensor(4, 16, grad=True), tensor(*other, dtype=FP32, grad=True)
        calls.reset()
        y = function(x, second)
        (call,) = calls.named("aclnnSwiGlu")
        assert call.tensors[0].dtype == "float32"
        assert (y.shape, y.dtype) == ((4, 8), BF16)
        assert backward(calls, y).count("aclnnSwiGluGrad") == 1
        assert (x.grad.dtype, second.grad.dtype, second.grad.shape) == (BF16, FP32, other)


@npu_contract()
def test_report_says_what_ran(calls):
    from mindspeed.ops import backend_report
    from mindspeed.ops.swiglu import swiglu

    swiglu(tensor(4, 16))
    assert backend_report("npu")["swiglu"].kernel == "npu"
