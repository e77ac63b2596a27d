"""Grouped products in Triton: groups of rows are found on the device, so no launch waits for their sizes."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._launch import INTERPRETED, Build

_TENSOR_CORES = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
_LARGE = {"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
"""Tile of a weight gradient, which sums over BLOCK_M: square, because its operands are read once per tile."""

_SCALAR = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}


def _tile(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes: float32 products keep full precision, hence run without tensor cores."""
    return _SCALAR if dtype == torch.float32 else _TENSOR_CORES


def _gradient_tile(dtype: torch.dtype) -> dict[str, int]:
    return _SCALAR if dtype == torch.float32 else _LARGE


@triton.jit
def dot(a, b, total, UPCAST: tl.constexpr):
    """`total + a @ b` in the precision of the operands; UPCAST because the interpreter's dot is wrong on bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def find_tile(ends_ptr, groups, rows, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end row) of this program's tile of rows; no rows if there are fewer tiles than programs.

    Rows after the last group form one more group, `group == groups`. Groups are covered by tiles of their own, so the number
    of tiles depends on device data; the host launches the largest number possible. Ends outside of the rows, which nobody can
    check without waiting for the device, are cut off: no program reads or writes outside of its tensors.
    """
    index = tl.arange(0, BLOCK_G)
    ends = tl.load(ends_ptr + index, mask=index < groups, other=0)
    ends = tl.where(index < groups, tl.minimum(tl.maximum(ends, 0), rows), rows)
    starts = tl.load(ends_ptr + index - 1, mask=(index > 0) & (index <= groups), other=0)
    starts = tl.where(index <= groups, tl.minimum(tl.maximum(starts, 0), rows), rows)
    tiles = (tl.maximum(ends - starts, 0) + BLOCK_M - 1) // BLOCK_M
    after = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    group = tl.sum((after <= tile).to(tl.int32), 0)
    here = index == group
    first = tl.sum(tl.where(here, starts + (tile - after + tiles) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    return group, first, end


@triton.jit
def multiply(
    x_ptr, weight_ptr, bias_ptr, ends_ptr, y_ptr, groups, rows, inner, columns,
    x_m, x_k, weight_g, weight_k, weight_n,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`y_g = x_g @ W_g + bias_g`; rows after the last group become zero."""
    group, first, end = find_tile(ends_ptr, groups, rows, BLOCK_G, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    live_row = row < end
    live_column = column < columns
    valid = live_row & (row * 0 + group < groups)
    weight_base = weight_ptr + tl.minimum(group, groups - 1).to(tl.int64) * weight_g
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        a = tl.load(x_ptr + row[:, None] * x_m + k[None, :] * x_k, mask=valid[:, None] & (k[None, :] < inner), other=0.0)
        b = tl.load(
            weight_base + k[:, None] * weight_k + column[None, :] * weight_n,
            mask=(k[:, None] < inner) & live_column[None, :],
            other=0.0,
        )
        total = dot(a, b, total, UPCAST)
    if BIAS:
        bias = tl.load(bias_ptr + tl.minimum(group, groups - 1) * columns + column, mask=live_column, other=0.0).to(tl.float32)
        total += tl.where(valid[:, None], bias[None, :], 0.0)
    tl.store(y_ptr + row[:, None] * columns + column[None, :], total, mask=live_row[:, None] & live_column[None, :])


@triton.jit
def weight_gradient(
    x_ptr, dy_ptr, ends_ptr, out_ptr, rows, inner, columns, x_m, x_k, dy_m, dy_n, out_g, out_k, out_n,
    ACCUMULATE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out_g = x_g^T @ dy_g`, or `out_g += ...`: the sum is formed in float32 and rounded once."""
    group = tl.program_id(2)
    start = tl.maximum(tl.load(ends_ptr + group - 1, mask=group > 0, other=0), 0)
    end = tl.minimum(tl.load(ends_ptr + group), rows)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M).to(tl.int64)
        live = row < end
        a = tl.load(x_ptr + row[None, :] * x_m + k[:, None] * x_k, mask=live[None, :] & (k[:, None] < inner), other=0.0)
        b = tl.load(
            dy_ptr + row[:, None] * dy_m + column[None, :] * dy_n, mask=live[:, None] & (column[None, :] < columns), other=0.0
        )
        total = dot(a, b, total, UPCAST)
    out = out_ptr + group.to(tl.int64) * out_g + k[:, None] * out_k + column[None, :] * out_n
    inside = (k[:, None] < inner) & (column[None, :] < columns)
    if ACCUMULATE:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total, mask=inside)


@triton.jit
def _clear_after(y_ptr, ends_ptr, groups, rows, columns, y_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    first = tl.program_id(0) * BLOCK_M
    end = tl.load(ends_ptr + groups - 1)
    if first + BLOCK_M > end:
        row = first + tl.arange(0, BLOCK_M).to(tl.int64)
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = ((row >= end) & (row < rows))[:, None] & (column < columns)[None, :]
        zero = tl.zeros([BLOCK_M, BLOCK_N], dtype=y_ptr.dtype.element_ty)
        tl.store(y_ptr + row[:, None] * y_m + column[None, :], zero, mask=inside)


_CLEARED = {"BLOCK_M": 16, "BLOCK_N": 256}


def clear_rows_after(y: Tensor, ends: Tensor) -> Tensor:
    """Zero the rows of y [M, N] from the last end on, in place; ends [G] on the device, at least one."""
    (rows, columns), (block_m, block_n) = y.shape, _CLEARED.values()
    with torch.cuda.device_of(y):  # Triton launches on the current device
        _clear_after[(triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))](
            y, ends, ends.shape[0], rows, columns, y.stride(0), **_CLEARED
        )
    return y


def grouped_multiply(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """`y_g = x_g @ W_g + bias_g` for x [M, K], weight [G, K, N], any strides; ends: int64 [G] on the device."""
    (rows, inner), (groups, _, columns) = x.shape, weight.shape
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tile = _tile(x.dtype)
    tiles = triton.cdiv(rows, tile["BLOCK_M"]) + groups + 1
    multiply[(tiles, triton.cdiv(columns, tile["BLOCK_N"]))](
        x, weight, x if bias is None else bias.contiguous(), ends, y, groups, rows, inner, columns, *x.stride(), *weight.stride(),
        BIAS=bias is not None, UPCAST=INTERPRETED, BLOCK_G=triton.next_power_of_2(groups + 1), **tile,
    )  # fmt: skip
    return y


def grouped_weight_gradient(x: Tensor, dy: Tensor, ends: Tensor, out: Tensor, *, accumulate: bool) -> Tensor:
    """`out_g (+)= x_g^T @ dy_g` for x [M, K], dy [M, N], out [G, K, N] of any strides and float dtype."""
    groups, inner, columns = out.shape
    tile = _gradient_tile(x.dtype)
    grid = (triton.cdiv(inner, tile["BLOCK_K"]), triton.cdiv(columns, tile["BLOCK_N"]), groups)
    weight_gradient[grid](
        x, dy, ends, out, x.shape[0], inner, columns, *x.stride(), *dy.stride(), *out.stride(),
        ACCUMULATE=accumulate, UPCAST=INTERPRETED, **tile,
    )  # fmt: skip
    return out


def _build(kernel: object, types: str, dtype: torch.dtype, **constants: object) -> Build:
    tile = _gradient_tile(dtype) if kernel is weight_gradient else _tile(dtype)
    blocks = {key: value for key, value in tile.items() if key.startswith("BLOCK")}
    return Build(kernel, types, blocks | {"UPCAST": False} | constants, {key: tile[key] for key in ("num_warps", "num_stages")})


_MULTIPLY = "*{0} *{0} *fp32 *i64 *{0} i32 i32 i32 i32 i64 i64 i64 i64 i64"
_GRADIENT = "*{0} *{0} *i64 *{1} i32 i32 i32 i64 i64 i64 i64 i64 i64 i64"
BUILDS = (
    Build(_clear_after, "*bf16 *i32 i32 i32 i32 i64", _CLEARED),
    _build(multiply, _MULTIPLY.format("bf16"), torch.bfloat16, BIAS=True, BLOCK_G=64),
    _build(multiply, _MULTIPLY.format("fp32"), torch.float32, BIAS=False, BLOCK_G=64),
    _build(weight_gradient, _GRADIENT.format("bf16", "bf16"), torch.bfloat16, ACCUMULATE=False),
    _build(weight_gradient, _GRADIENT.format("bf16", "fp32"), torch.bfloat16, ACCUMULATE=True),
    _build(weight_gradient, _GRADIENT.format("fp32", "fp32"), torch.float32, ACCUMULATE=True),
)
