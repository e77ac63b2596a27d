"""Grouped products with int8 operands in Triton, under the interpreter, against the definitions."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.triton_interpreter import triton_interpreter

ENDS = [3, 3, 12]


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def both(choice, run):
    """The kernel's result and that of the definition."""
    from mindspeed.ops import backend_report, backends

    ours = run()
    assert backend_report(torch.get_default_device().type)[choice].kernel == "triton"
    with backends(f"{choice}=ref"):
        return ours, run()


@triton_interpreter("quant_gmm=triton")
@pytest.mark.parametrize("act_type", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quant_gmm(dtype, act_type):
    from mindspeed.ops.quant_gmm import npu_quant_gmm

    x, weight = int8(15, 21), int8(3, 9, 21).transpose(1, 2)
    scale = (torch.rand(3, 9) * 1e-3).to(torch.float32 if dtype == torch.float16 else dtype)
    bias = torch.randint(-1000, 1000, (3, 9), dtype=torch.int32)
    ours, expected = both(
        "quant_gmm",
        lambda: npu_quant_gmm(
            x,
            weight,
            scale,
            per_token_scale=torch.arange(15.0) / 15,
            bias=bias,
            group_list=ENDS,
            output_dtype=dtype,
            act_type=act_type,
        ),
    )
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@triton_interpreter("quant_gmm=triton")
def test_quant_gmm_into_int8_rounds_and_saturates():
    from mindspeed.ops.quant_gmm import npu_quant_gmm_v2

    x, weight = int8(15, 21), int8(3, 21, 9)
    bits = torch.full((3, 1), 2.0**-7).view(torch.int32).to(torch.int64)
    ours, expected = both("quant_gmm", lambda: npu_quant_gmm_v2(x, weight, bits, group_list=[3, 0, 9], output_dtype=torch.int8))
    assert torch.equal(ours, expected)
    assert {-128, 127} <= set(ours.flatten().tolist())


@triton_interpreter("weight_quant_gmm=triton")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_quant_gmm(dtype, full):
    from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm

    x, weight, scale = torch.randn(15, 21).to(dtype), int8(3, 21, 9), (torch.rand(3, 9) / 100).to(dtype)
    options = {}
    if full:
        options["antiquant_offset"] = torch.randn(3, 9).to(dtype)
        options["bias"] = torch.randn(3, 9).to(torch.float16 if dtype == torch.float16 else torch.float32)
    ours, expected = both("weight_quant_gmm", lambda: npu_weight_quant_gmm(x, weight, scale, group_list=ENDS, **options))
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]  # the definition rounds its product once more
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    assert ours[12:].eq(0).all()
