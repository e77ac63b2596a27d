"""RMSNorm in Triton: one program per row forward; backward a slice of rows per program, with partial sums of the weight gradient.

torch's own fused kernel serves equal dtypes; this one serves a float32 weight with 16-bit input too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._launch import Build, as_rows, row_block, row_programs, too_long, triton_body


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, rstd_ptr, x_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(y_ptr + row * size + cols, x * rstd * weight, mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, dy_stride, x_stride, rows, size, rows_per_program,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, rows)):
        x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x_hat = x * rstd
        g = dy * weight
        dx = rstd * (g - x_hat * (tl.sum(g * x_hat, 0) / size))
        tl.store(dx_ptr + row * size + cols, dx, mask=inside)
        dweight += dy * x_hat
    tl.store(partial_ptr + program * size + cols, dweight, mask=inside)


@triton_body("rms_norm", declines=lambda x, weight, eps: too_long(x.shape[-1]))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Forward; returns y like x and rstd [..., 1] in float32."""
    x_rows = as_rows(x)
    rows, size = x_rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _forward[(rows,)](x_rows, weight.contiguous(), y, rstd, x_rows.stride(0), size, eps, **row_block(size))
    return y, rstd


@triton_body("rms_norm_backward", declines=lambda dy, x, weight, rstd: too_long(x.shape[-1]))
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    x_rows, dy_rows = as_rows(x), as_rows(dy)
    rows, size = x_rows.shape
    options = row_block(size)
    programs, per_program = row_programs(x, rows, options["num_warps"])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        dy_rows, x_rows, weight.contiguous(), rstd.contiguous(), dx, partial, dy_rows.stride(0), x_rows.stride(0),
        rows, size, per_program, **options,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


BUILDS = (
    Build(_forward, "*bf16 *fp32 *bf16 *fp32 i64 i32 fp32", {"BLOCK": 4096}),
    Build(_backward, "*bf16 *bf16 *fp32 *fp32 *bf16 *fp32 i64 i64 i32 i32 i32", {"BLOCK": 4096}),
)
