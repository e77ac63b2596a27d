"""Weight gradient accumulation: `grad += grad_output^T @ total_input` in place, without a temporary of weight size."""

# T tokens (leading dimensions flattened), K input size, N output size

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import row_blocks
from mindspeed.ops._registry import define, register_kernel


def npu_matmul_add_fp32(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """Add `grad_output^T @ total_input` to float32 `grad` in place.

    total_input: [..., K], grad_output: [..., N], equal leading dimensions and float dtype; grad: [N, K], contiguous. The
    product is formed and added in float32: it is never rounded to 16 bit.
    """
    _accumulate("npu_matmul_add_fp32", total_input, grad_output, grad, (torch.float32,))


def npu_matmul_add_fp16(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """As `npu_matmul_add_fp32` for a float16 or bfloat16 `grad`: summed in float32 and rounded once."""
    _accumulate("npu_matmul_add_fp16", total_input, grad_output, grad, _checks.HALVES)


def _accumulate(op: str, total_input: Tensor, grad_output: Tensor, grad: Tensor, grad_dtypes: tuple[torch.dtype, ...]) -> None:
    _checks.tensor(op, "total_input", total_input)
    _checks.tensor(op, "grad_output", grad_output)
    _checks.dtype_of(op, "grad_output", grad_output, total_input.dtype)
    _checks.tensor(op, "grad", grad, grad_dtypes)
    _checks.require(
        op, "total_input", total_input.dim() >= 2, "must have at least 2 dimensions", f"shape {tuple(total_input.shape)}"
    )
    _checks.shape(op, "grad_output", grad_output, (*total_input.shape[:-1], grad_output.shape[-1]))
    _checks.shape(op, "grad", grad, (grad_output.shape[-1], total_input.shape[-1]))
    _checks.require(op, "grad", grad.is_contiguous(), "must be contiguous", f"strides {grad.stride()}")
    _checks.require(op, "grad", not grad.requires_grad, "must not require grad", "requires_grad=True")
    _checks.same_device(op, total_input=total_input, grad_output=grad_output, grad=grad)
    with torch.no_grad():
        torch.ops.mindspeed.matmul_add_(total_input.flatten(0, -2), grad_output.flatten(0, -2), grad)


def add_product(grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """`grad += dy^T @ x` for float32 grad; 16-bit operands are widened a block of rows at a time."""
    if dy.dtype == grad.dtype:
        grad.addmm_(dy.t(), x)
        return
    for rows in row_blocks(x.shape[0], 4 * max(x.shape[1], dy.shape[1])):
        grad.addmm_(dy[rows].to(grad.dtype).t(), x[rows].to(grad.dtype))


def _reference(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    if total_input.numel() == 0 or grad_output.numel() == 0:
        return
    if grad.dtype == torch.float32:
        add_product(grad, grad_output, total_input)
    else:
        total = grad.to(torch.float32)
        add_product(total, grad_output, total_input)
        grad.copy_(total)


define(
    "matmul_add_(Tensor total_input, Tensor grad_output, Tensor(a!) grad) -> ()",
    family="matmul_add",
    reference=_reference,
    fake=lambda total_input, grad_output, grad: None,
)


WIDE_ADDMM = "2.10"
"""Earlier versions have `addmm.dtype_out` too, but refuse a float32 tensor to add to (pytorch/pytorch#167931)."""


def _no_wide_addmm(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> str | None:
    if torch.torch_version.TorchVersion(torch.__version__) < WIDE_ADDMM:
        return f"torch adds products of 16-bit matrices into float32 from {WIDE_ADDMM} on"
    if grad.dtype != torch.float32 or total_input.dtype not in _checks.HALVES:
        return f"cuBLAS adds products of 16-bit matrices into float32, not {total_input.dtype} into {grad.dtype}"
    return None


@register_kernel("matmul_add_", "aten", devices=("cuda",), declines=_no_wide_addmm)
def _wide_addmm(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """One cuBLAS product with beta = 1; input and output of `addmm` are the same tensor, so nothing is copied."""
    torch.ops.aten.addmm.dtype_out(grad, grad_output.t(), total_input, torch.float32, out=grad)
