"""Grouped products with int8 operands, and with int8 weights."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed.ops._quantised import integer_product, integer_product_in_float
from mindspeed.ops.quant_gmm import npu_quant_gmm, npu_quant_gmm_v2
from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm, npu_weight_quant_gmm_v2
from mindspeed.testing.operators import check_operator

GROUPS = [[3, 4, 5], [0, 7, 5], [12, 0, 0], [2, 1, 3], [0, 0, 0]]
ACTIVATIONS = {
    0: lambda x: x,
    1: torch.relu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    4: lambda x: x / (1 + torch.exp(-1.702 * x)),
    5: F.silu,
}


def integers(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def textbook(x, weight, scale, sizes, pts=None, bias=None, act=0):
    """float64 [M, N]."""
    y, start = torch.zeros(x.shape[0], weight.shape[2], dtype=torch.float64), 0
    for g, size in enumerate(sizes):
        rows = slice(start, start + size)
        acc = x[rows].double() @ weight[g].double()
        acc = (acc if bias is None else acc + bias[g].double()) * scale[g].double()
        y[rows] = ACTIVATIONS[act](acc if pts is None else acc * pts[rows].double().unsqueeze(1))
        start += size
    return y


@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
def test_float_output(sizes, act, dtype, extras):
    x, weight = integers(12, 8), integers(3, 6, 8).transpose(1, 2)
    scale = (torch.rand(3, 6) / 5000).to(torch.float32 if dtype == torch.float16 else torch.bfloat16)
    options = {"act_type": act, "output_dtype": dtype}
    if extras:
        scale = scale[:, :1]
        options |= {"per_token_scale": torch.rand(12), "bias": torch.randint(-999, 999, (3, 6), dtype=torch.int32)}
    exact = textbook(x, weight, scale, sizes, options.get("per_token_scale"), options.get("bias"), act)
    ends = torch.tensor(sizes).cumsum(0)
    rounding = 2e-3 if dtype == torch.float16 else 1e-2
    for y in (
        npu_quant_gmm(x, weight, scale, group_list=ends, **options),
        npu_quant_gmm_v2(x, weight, scale, group_list=torch.tensor(sizes), **options),
        torch.ops.mindspeed.npu_quant_gmm(x, weight, scale, group_list=ends.tolist(), **options),
        torch.ops.mindspeed.npu_quant_gmm_v2(x, weight, scale, group_list=torch.tensor(sizes), **options),
    ):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=rounding)


def test_int8_output_is_rounded_half_to_even_and_saturates():
    x, weight = torch.tensor([[1], [3], [5], [-1], [127], [-128]], dtype=torch.int8), torch.ones(1, 1, 1, dtype=torch.int8)
    for factor, expected in ((0.5, [0, 2, 2, 0, 64, -64]), (2.0, [2, 6, 10, -2, 127, -128])):
        bits = torch.tensor([[factor]]).view(torch.int32).to(torch.int64)
        y = npu_quant_gmm(x, weight, bits, group_list=[6], output_dtype=torch.int8)
        assert y.dtype == torch.int8
        assert y.flatten().tolist() == expected


def test_integer_product_through_float32_is_exact():
    x, weight = torch.full((2, 2500), -128, dtype=torch.int8), torch.full((2500, 3), -128, dtype=torch.int8)
    x[0], weight[:, 1] = integers(2500), integers(2500)
    expected = x.to(torch.int64) @ weight.to(torch.int64)
    for product in (integer_product(x, weight), integer_product_in_float(x, weight)):
        assert product.dtype == torch.int32
        assert torch.equal(product.to(torch.int64), expected)


def test_default_output_is_float16():
    assert npu_quant_gmm(integers(2, 3), integers(1, 3, 4), torch.ones(1, 4)).dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"act_type": 3}, NotImplementedError, "act_type 3"),
        ({"act_type": 6}, ValueError, "act_type must be one of 0, 1, 2, 4, 5"),
        ({"output_dtype": torch.bfloat16}, TypeError, "scale must have dtype bfloat16, got float32"),
        ({"output_dtype": torch.float32}, ValueError, "output_dtype must be one of"),
        ({"scale": torch.ones(1, 3)}, ValueError, r"scale must have shape \(1, 4\) or \(1, 1\)"),
        ({"x": torch.ones(2, 3)}, TypeError, "x must have dtype int8, got float32"),
        ({"offset": torch.ones(1)}, ValueError, "offset must be None"),
        ({"bias": torch.ones(1, 4)}, TypeError, "bias must have dtype int32"),
        (
            {"scale": torch.ones(1, 4).long(), "output_dtype": torch.int8, "act_type": 1},
            ValueError,
            "act_type must be 0 for int8",
        ),
        ({"group_list": [3]}, ValueError, "group_list must not count more than the 2 rows"),
    ],
)
def test_errors(change, error, text):
    arguments = {"x": integers(2, 3), "weight": integers(1, 3, 4), "scale": torch.ones(1, 4)} | change
    with pytest.raises(error, match=f"npu_quant_gmm: {text}"):
        npu_quant_gmm(**arguments)


@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
def test_integer_weights(sizes, dtype, extras):
    x, weight, scale = torch.randn(12, 8).to(dtype), integers(3, 8, 6), (torch.rand(3, 6) / 100).to(dtype)
    options = {}
    if extras:
        bias_dtype = torch.float16 if dtype == torch.float16 else torch.float32
        options = {"antiquant_offset": torch.randint(-9, 9, (3, 6)).to(dtype), "bias": torch.randn(3, 6).to(bias_dtype)}
    exact, start = torch.zeros(12, 6, dtype=torch.float64), 0
    for g, size in enumerate(sizes):
        matrix = (weight[g].double() + (options["antiquant_offset"][g].double() if extras else 0)) * scale[g].double()
        rows = slice(start, start + size)
        exact[rows] = x[rows].double() @ matrix + (options["bias"][g].double() if extras else 0)
        start += size
    ends = torch.tensor(sizes).cumsum(0)
    rounding = 5e-3 if dtype == torch.float16 else 5e-2
    for y in (
        npu_weight_quant_gmm(x, weight, scale, group_list=ends.tolist(), **options),
        npu_weight_quant_gmm_v2(x, weight.transpose(1, 2).contiguous().transpose(1, 2), scale, group_list=sizes, **options),
        torch.ops.mindspeed.npu_weight_quant_gmm(x, weight, scale, group_list=ends, **options),
        torch.ops.mindspeed.npu_weight_quant_gmm_v2(x, weight, scale, group_list=torch.tensor(sizes), **options),
    ):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=rounding)


def test_errors_of_integer_weights():
    x, weight, scale = torch.randn(2, 3).half(), integers(1, 3, 4), torch.ones(1, 4).half()
    with pytest.raises(TypeError, match="antiquant_scale must have dtype float16, got float32"):
        npu_weight_quant_gmm(x, weight, scale.float())
    with pytest.raises(TypeError, match="x must have dtype float16 or bfloat16, got float32"):
        npu_weight_quant_gmm(x.float(), weight, scale)
    with pytest.raises(ValueError, match="act_type must be one of 0, got 1"):
        npu_weight_quant_gmm(x, weight, scale, act_type=1)
    with pytest.raises(RuntimeError, match="has no derivative, .*; use npu_gmm with a float weight for training"):
        npu_weight_quant_gmm(x.requires_grad_(), weight, scale)


def test_operators_are_well_formed():
    ends = torch.tensor([2, 4])
    check_operator(
        torch.ops.mindspeed.quant_gmm.default,
        (integers(4, 3), integers(2, 3, 5), torch.rand(2, 5), torch.rand(4), None, ends, 0, torch.float16, 5),
        (
            integers(0, 3),
            integers(2, 3, 5),
            torch.rand(2, 1),
            None,
            None,
            torch.zeros(2, dtype=torch.int64),
            1,
            torch.float16,
            0,
        ),
    )
    check_operator(
        torch.ops.mindspeed.weight_quant_gmm.default,
        (torch.randn(4, 3).half(), integers(2, 3, 5), torch.rand(2, 5).half(), None, None, ends, 0),
    )
