"""Grouped products in Triton, under the interpreter: odd sizes, empty groups, rows after the last group, all layouts."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.triton_interpreter import triton_interpreter

GROUPS = {"odd": [3, 5, 12], "empty first and middle": [0, 7, 7], "empty last": [4, 13, 13], "all empty": [0, 0, 0]}


def normal(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def ran_triton(*names):
    from mindspeed.ops import backend_report

    report = backend_report(torch.get_default_device().type)
    assert {name: report[name].kernel for name in names} == dict.fromkeys(names, "triton"), report


@triton_interpreter("gmm=triton")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gmm(dtype, ends, transposed):
    from mindspeed.ops._gmm import _reference
    from mindspeed.ops.gmm import npu_gmm
    from mindspeed.testing.operators import assert_operator_accurate

    weight = normal(3, 9, 21, dtype=dtype).detach().transpose(1, 2) if transposed else normal(3, 21, 9, dtype=dtype)
    bias = normal(3, 9, dtype=torch.float16 if dtype == torch.float16 else torch.float32)
    groups = torch.tensor(ends)
    assert_operator_accurate(
        lambda x, w, b: npu_gmm(x, w, bias=b, group_list=groups),
        lambda x, w, b: torch.cat(
            [x[start:end] @ w[g] + b[g].to(x.dtype) for g, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
            + [x[ends[-1] :, :9] * 0]
        ),
        normal(15, 21, dtype=dtype),
        weight.detach().requires_grad_(),
        bias,
    )
    ran_triton("gmm", "gmm_backward")
    assert _reference(*map(torch.zeros_like, (torch.empty(0, 21), weight)), None, groups * 0, 0, 0).shape == (0, 9)


@triton_interpreter("gmm=triton")
def test_gmm_wider_than_one_tile_and_sizes_instead_of_ends():
    from mindspeed.ops.gmm import npu_gmm_v2
    from mindspeed.testing.operators import assert_operator_accurate

    sizes = [70, 0, 65]
    assert_operator_accurate(
        lambda x, w: npu_gmm_v2(x, w, group_list=sizes),
        lambda x, w: torch.cat([x[:70] @ w[0], x[70:] @ w[2]]) + 0 * w[1].sum(),
        normal(135, 70),
        normal(3, 70, 130),
    )


@triton_interpreter("gmm=triton")
def test_gmm_group_type_2():
    from mindspeed.ops.gmm import npu_gmm

    x, weight = torch.randn(12, 21), torch.randn(12, 9)
    y = npu_gmm(x.t(), weight, group_list=[5, 5, 11], group_type=2)
    torch.testing.assert_close(y, torch.stack([x[:5].t() @ weight[:5], torch.zeros(21, 9), x[5:11].t() @ weight[5:11]]))


@triton_interpreter("groupmatmul_add=triton,matmul_add=triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accumulation_into_float32(dtype):
    from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32
    from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32

    x, dy = torch.randn(12, 21).to(dtype), torch.randn(12, 9).to(dtype)
    grad = torch.randn(3, 21, 9)
    spans = [slice(0, 4), slice(4, 4), slice(4, 12)]
    expected = grad.double() + torch.stack([x[rows].double().t() @ dy[rows].double() for rows in spans])
    npu_groupmatmul_add_fp32(x, dy, [4, 4, 12], grad)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)

    grad = torch.randn(9, 21)
    expected = grad.double() + dy.double().t() @ x.double()
    npu_matmul_add_fp32(x.view(3, 4, 21), dy.view(3, 4, 9), grad)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)
    ran_triton("groupmatmul_add_", "matmul_add_")


@triton_interpreter("matmul_add=triton")
def test_accumulation_into_16_bit_rounds_once():
    from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16

    x, dy, grad = (torch.randn(*shape).half() for shape in ((7, 5), (7, 3), (3, 5)))
    expected = (grad.double() + dy.double().t() @ x.double()).half()
    npu_matmul_add_fp16(x, dy, grad)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


@triton_interpreter("gmm=triton")
@pytest.mark.parametrize("end", [0, 15, 16, 37, 40])
@pytest.mark.parametrize("columns", [8, 300])
def test_rows_after_the_last_group_are_cleared_and_no_others(columns, end):
    from mindspeed.ops.kernels.triton._grouped import clear_rows_after

    wide = torch.ones(40, columns + 5, dtype=torch.bfloat16)
    ends = torch.tensor([end // 2, end], dtype=torch.int32)
    cleared = clear_rows_after(wide[:, :columns], ends)
    assert (wide[:end] == 1).all() and (cleared[end:] == 0).all() and (wide[:, columns:] == 1).all()
