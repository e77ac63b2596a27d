"""Grouped products with int8 operands in Triton: both sides int8 with exact int32 sums, or int8 weights widened tile by tile."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._grouped import dot, find_tile
from mindspeed.ops.kernels.triton._launch import INTERPRETED, Build

BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}
OPTIONS = {"num_warps": 4, "num_stages": 3}
NONE, RELU, GELU_TANH, FAST_GELU, SILU = 0, 1, 2, 4, 5


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        x = tl.maximum(x, 0.0)
    if ACTIVATION == 2:  # tanh(z) = 2 sigmoid(2z) - 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACTIVATION == 4:
        x = x * tl.sigmoid(1.702 * x)
    if ACTIVATION == 5:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _to_int8(x):
    """Saturate and round half to even: adding 1.5 * 2^23 leaves no bits behind the point."""
    x = tl.minimum(tl.maximum(x, -128.0), 127.0)
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def multiply_int8(
    x_ptr, weight_ptr, scale_ptr, row_scale_ptr, bias_ptr, ends_ptr, y_ptr, groups, rows, inner, columns,
    x_m, x_k, weight_g, weight_k, weight_n, scale_g, scale_n,
    ROW_SCALE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, INT8_OUT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`y_g = act((x_g @ W_g + bias_g) * scale_g * row_scale)`; rows after the last group become zero."""
    group, first, end = find_tile(ends_ptr, groups, rows, BLOCK_G, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    live_row, live_column = row < end, column < columns
    valid = live_row & (row * 0 + group < groups)
    group = tl.minimum(group, groups - 1).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        a = tl.load(x_ptr + row[:, None] * x_m + k[None, :] * x_k, mask=valid[:, None] & (k[None, :] < inner), other=0)
        weight = weight_ptr + group * weight_g + k[:, None] * weight_k + column[None, :] * weight_n
        b = tl.load(weight, mask=(k[:, None] < inner) & live_column[None, :], other=0)
        total += tl.dot(a, b, out_dtype=tl.int32)
    if BIAS:
        total += tl.load(bias_ptr + group * columns + column, mask=live_column, other=0)[None, :]
    scale = tl.load(scale_ptr + group * scale_g + column * scale_n, mask=live_column, other=0.0)
    y = total.to(tl.float32) * scale[None, :]
    if ROW_SCALE:
        y *= tl.load(row_scale_ptr + row, mask=valid, other=0.0)[:, None]
    y = tl.where(valid[:, None], _activate(y, ACTIVATION), 0.0)
    target = y_ptr + row[:, None] * columns + column[None, :]
    if INT8_OUT:
        tl.store(target, _to_int8(y), mask=live_row[:, None] & live_column[None, :])
    else:
        tl.store(target, y, mask=live_row[:, None] & live_column[None, :])


@triton.jit
def multiply_int8_weight(
    x_ptr, weight_ptr, scale_ptr, offset_ptr, bias_ptr, ends_ptr, y_ptr, groups, rows, inner, columns,
    x_m, x_k, weight_g, weight_k, weight_n,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`y_g = x_g @ ((W_g + offset_g) * scale_g) + bias_g`, the weight rounded to the dtype of x before the product."""
    group, first, end = find_tile(ends_ptr, groups, rows, BLOCK_G, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    live_row, live_column = row < end, column < columns
    valid = live_row & (row * 0 + group < groups)
    group = tl.minimum(group, groups - 1).to(tl.int64)
    place = group * columns + column
    scale = tl.load(scale_ptr + place, mask=live_column, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        a = tl.load(x_ptr + row[:, None] * x_m + k[None, :] * x_k, mask=valid[:, None] & (k[None, :] < inner), other=0.0)
        weight = weight_ptr + group * weight_g + k[:, None] * weight_k + column[None, :] * weight_n
        b = tl.load(weight, mask=(k[:, None] < inner) & live_column[None, :], other=0).to(tl.float32)
        if OFFSET:
            b += tl.load(offset_ptr + place, mask=live_column, other=0.0).to(tl.float32)[None, :]
        total = dot(a, (b * scale).to(a.dtype), total, UPCAST)
    if BIAS:
        total += tl.load(bias_ptr + place, mask=live_column, other=0.0).to(tl.float32)[None, :]
    total = tl.where(valid[:, None], total, 0.0)
    tl.store(y_ptr + row[:, None] * columns + column[None, :], total, mask=live_row[:, None] & live_column[None, :])


def _grid(rows: int, groups: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, BLOCKS["BLOCK_M"]) + groups + 1, triton.cdiv(columns, BLOCKS["BLOCK_N"])


def grouped_multiply_int8(
    x: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor | None, bias: Tensor | None, ends: Tensor,
    dtype: torch.dtype, activation: int,
) -> Tensor:  # fmt: skip
    """Both operands int8; scale: float32 [G, N] of any strides; returns [M, N] of `dtype`."""
    (rows, inner), (groups, _, columns) = x.shape, weight.shape
    y = torch.empty(rows, columns, dtype=dtype, device=x.device)
    multiply_int8[_grid(rows, groups, columns)](
        x, weight, scale, x if row_scale is None else row_scale.contiguous(), x if bias is None else bias.contiguous(), ends, y,
        groups, rows, inner, columns, *x.stride(), *weight.stride(), *scale.stride(),
        ROW_SCALE=row_scale is not None, BIAS=bias is not None, ACTIVATION=activation, INT8_OUT=dtype == torch.int8,
        BLOCK_G=triton.next_power_of_2(groups + 1), **BLOCKS, **OPTIONS,
    )  # fmt: skip
    return y


def grouped_multiply_int8_weight(
    x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    """Only the weight int8; scale and offset [G, N] in the dtype of x; returns [M, N] in that dtype."""
    (rows, inner), (groups, _, columns) = x.shape, weight.shape
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    stand_ins = [x if value is None else value.contiguous() for value in (offset, bias)]
    multiply_int8_weight[_grid(rows, groups, columns)](
        x, weight, scale.contiguous(), *stand_ins, ends, y, groups, rows, inner, columns, *x.stride(), *weight.stride(),
        OFFSET=offset is not None, BIAS=bias is not None, UPCAST=INTERPRETED, BLOCK_G=triton.next_power_of_2(groups + 1),
        **BLOCKS, **OPTIONS,
    )  # fmt: skip
    return y


_SIZES = "i32 i32 i32 i32 i64 i64 i64 i64 i64"
BUILDS = (
    Build(
        multiply_int8,
        f"*i8 *i8 *fp32 *fp32 *i32 *i64 *fp16 {_SIZES} i64 i64",
        {"ROW_SCALE": True, "BIAS": True, "ACTIVATION": GELU_TANH, "INT8_OUT": False, "BLOCK_G": 64} | BLOCKS,
        OPTIONS,
    ),
    Build(
        multiply_int8,
        f"*i8 *i8 *fp32 *fp32 *i32 *i64 *i8 {_SIZES} i64 i64",
        {"ROW_SCALE": False, "BIAS": False, "ACTIVATION": NONE, "INT8_OUT": True, "BLOCK_G": 64} | BLOCKS,
        OPTIONS,
    ),
    Build(
        multiply_int8_weight,
        f"*bf16 *i8 *bf16 *bf16 *fp32 *i64 *bf16 {_SIZES}",
        {"OFFSET": True, "BIAS": True, "UPCAST": False, "BLOCK_G": 64} | BLOCKS,
        OPTIONS,
    ),
)
