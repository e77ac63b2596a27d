"""SwiGLU in Triton, with an optional bias [2F] or an optional weight per row: blocks of columns forward, rows backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._launch import Build, as_rows, row_programs, triton_body

COLUMNS = 1024


@triton.jit
def _halves(x_ptr, bias_ptr, row_start, cols, live, size, HAS_BIAS: tl.constexpr):
    a = tl.load(x_ptr + row_start + cols, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row_start + size + cols, mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + size + cols, mask=live, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _forward(
    x_ptr, bias_ptr, weights_ptr, y_ptr, x_stride, size, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    a, b = _halves(x_ptr, bias_ptr, row * x_stride, cols, inside, size, HAS_BIAS)
    y = a * tl.sigmoid(a) * b
    if HAS_WEIGHTS:
        y *= tl.load(weights_ptr + row).to(tl.float32)
    tl.store(y_ptr + row * size + cols, y, mask=inside)


@triton.jit
def _backward(
    dy_ptr, x_ptr, weights_ptr, dx_ptr, dweights_ptr, dy_stride, x_stride, size, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < size
        a, b = _halves(x_ptr, x_ptr, row * x_stride, cols, inside, size, False)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(a)
        dweight += dy * a * sigmoid * b
        dy = dy * weight
        tl.store(dx_ptr + row * 2 * size + cols, dy * b * sigmoid * (1 + a * (1 - sigmoid)), mask=inside)
        tl.store(dx_ptr + row * 2 * size + size + cols, dy * a * sigmoid, mask=inside)
    if HAS_WEIGHTS:
        tl.store(dweights_ptr + row, tl.sum(dweight, 0))


@triton.jit
def _bias_backward(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, dy_stride, x_stride, rows, size, rows_per_program, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    sum_a = tl.zeros([BLOCK], dtype=tl.float32)
    sum_b = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, rows)):
        a, b = _halves(x_ptr, bias_ptr, row * x_stride, cols, inside, size, True)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(a)
        da = dy * b * sigmoid * (1 + a * (1 - sigmoid))
        db = dy * a * sigmoid
        tl.store(dx_ptr + row * 2 * size + cols, da, mask=inside)
        tl.store(dx_ptr + row * 2 * size + size + cols, db, mask=inside)
        sum_a += da
        sum_b += db
    tl.store(partial_ptr + program * 2 * size + cols, sum_a, mask=inside)
    tl.store(partial_ptr + program * 2 * size + size + cols, sum_b, mask=inside)


def _not_last(x: Tensor, dim: int) -> str | None:
    return None if dim == x.dim() - 1 else "the halves are not in the last dimension"


@triton_body("swiglu", declines=_not_last)
def swiglu(x: Tensor, dim: int) -> Tensor:
    """Forward."""
    return _launch_forward(x, None, None)


@triton_body("bias_swiglu")
def bias_swiglu(x: Tensor, bias: Tensor) -> Tensor:
    """Forward of `swiglu(x + bias)`."""
    return _launch_forward(x, bias.contiguous(), None)


@triton_body("swiglu_weighted")
def swiglu_weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Forward of `swiglu(x) * weights`."""
    return _launch_forward(x, None, weights.contiguous())


def _launch_forward(x: Tensor, bias: Tensor | None, weights: Tensor | None) -> Tensor:
    x_rows, size = as_rows(x), x.shape[-1] // 2
    rows = x_rows.shape[0]
    y = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    block = min(COLUMNS, triton.next_power_of_2(size))
    _forward[(rows, triton.cdiv(size, block))](
        x_rows, x_rows if bias is None else bias, x_rows if weights is None else weights, y, x_rows.stride(0), size,
        HAS_BIAS=bias is not None, HAS_WEIGHTS=weights is not None, BLOCK=block,
    )  # fmt: skip
    return y


@triton_body("swiglu_backward", declines=lambda dy, x, dim: _not_last(x, dim))
def swiglu_backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Gradient of x."""
    return _launch_backward(dy, x, None)[0]


@triton_body("swiglu_weighted_backward")
def swiglu_weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights."""
    dx, dweights = _launch_backward(dy, x, weights.contiguous())
    return dx, dweights.to(weights.dtype)


def _launch_backward(dy: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    x_rows, dy_rows, size = as_rows(x), as_rows(dy), x.shape[-1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweights = torch.empty((*x.shape[:-1], 1) if weights is not None else 0, dtype=torch.float32, device=x.device)
    _backward[(x_rows.shape[0],)](
        dy_rows, x_rows, x_rows if weights is None else weights, dx, dweights, dy_rows.stride(0), x_rows.stride(0), size,
        HAS_WEIGHTS=weights is not None, BLOCK=min(COLUMNS, triton.next_power_of_2(size)),
    )  # fmt: skip
    return dx, dweights


@triton_body("bias_swiglu_backward")
def bias_swiglu_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    x_rows, dy_rows, size = as_rows(x), as_rows(dy), x.shape[-1] // 2
    rows = x_rows.shape[0]
    block = min(COLUMNS, triton.next_power_of_2(size))
    programs, per_program = row_programs(x, rows, 4 * triton.cdiv(size, block))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, 2 * size, dtype=torch.float32, device=x.device)
    _bias_backward[(programs, triton.cdiv(size, block))](
        dy_rows,
        x_rows,
        bias.contiguous(),
        dx,
        partial,
        dy_rows.stride(0),
        x_rows.stride(0),
        rows,
        size,
        per_program,
        BLOCK=block,
    )
    return dx, partial.sum(0).to(bias.dtype)


BUILDS = (
    Build(_forward, "*bf16 *bf16 *fp32 *bf16 i64 i32", {"HAS_BIAS": True, "HAS_WEIGHTS": True, "BLOCK": COLUMNS}),
    Build(_backward, "*bf16 *bf16 *fp32 *bf16 *fp32 i64 i64 i32", {"HAS_WEIGHTS": True, "BLOCK": COLUMNS}),
    Build(_bias_backward, "*bf16 *bf16 *bf16 *bf16 *fp32 i64 i64 i32 i32 i32", {"BLOCK": COLUMNS}),
)
