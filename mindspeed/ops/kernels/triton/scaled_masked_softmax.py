"""Scaled masked softmax in Triton: one program per row of keys."""

# B batch, N heads, Q query positions, K key positions

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._launch import Build, as_rows, row_block, too_long, triton_body


@triton.jit
def _forward(
    x_ptr, mask_ptr, y_ptr, x_stride, heads, queries, keys, mask_b, mask_n, mask_q, mask_k, scale,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    query = row % queries
    key = tl.arange(0, BLOCK)
    limit = keys
    if CAUSAL:
        limit = tl.minimum(query + 1, keys)  # keys after the query are neither read nor counted
    seen = key < limit
    score = tl.load(x_ptr + row * x_stride + key, mask=seen, other=float("-inf")).to(tl.float32) * scale
    score = tl.where(seen, score, float("-inf"))  # a negative scale turns the padding round
    if HAS_MASK:
        head = (row // queries) % heads
        batch = row // queries // heads
        excluded = tl.load(mask_ptr + batch * mask_b + head * mask_n + query * mask_q + key * mask_k, mask=seen, other=1)
        score = tl.where(excluded != 0, float("-inf"), score)
    largest = tl.max(score, 0)
    weight = tl.exp(score - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weight, 0)
    tl.store(y_ptr + row * keys + key, weight / tl.where(total == 0.0, 1.0, total), mask=key < keys)


@triton.jit
def _backward(dy_ptr, y_ptr, dx_ptr, dy_stride, y_stride, keys, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BLOCK)
    inside = key < keys
    dy = tl.load(dy_ptr + row * dy_stride + key, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * y_stride + key, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * keys + key, scale * y * (dy - tl.sum(dy * y, 0)), mask=inside)


def _declines(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> str | None:
    return too_long(x.shape[-1]) or (f"{x.dim()} dimensions are more than 4" if x.dim() > 4 else None)


@triton_body("scaled_masked_softmax", declines=_declines)
def scaled_masked_softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Forward."""
    x_rows = as_rows(x)
    shape = (1,) * (4 - x.dim()) + tuple(x.shape)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = (0, 0, 0, 0) if mask is None else mask.expand(x.shape).view(torch.uint8).expand(shape).stride()
    _forward[(x_rows.shape[0],)](
        x_rows, x_rows if mask is None else mask.view(torch.uint8), y, x_rows.stride(0), *shape[1:], *strides, scale,
        HAS_MASK=mask is not None, CAUSAL=causal, **row_block(shape[3]),
    )  # fmt: skip
    return y


@triton_body("scaled_masked_softmax_backward", declines=lambda dy, y, scale: too_long(y.shape[-1]))
def scaled_masked_softmax_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    """Gradient of x."""
    y_rows, dy_rows = as_rows(y), as_rows(dy)
    rows, keys = y_rows.shape
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    _backward[(rows,)](dy_rows, y_rows, dx, dy_rows.stride(0), y_rows.stride(0), keys, scale, **row_block(keys))
    return dx


BUILDS = (
    Build(_forward, "*bf16 *u8 *bf16 i64 i32 i32 i32 i64 i64 i64 i64 fp32", {"HAS_MASK": True, "CAUSAL": True, "BLOCK": 4096}),
    Build(_backward, "*bf16 *bf16 *bf16 i64 i64 i32 fp32", {"BLOCK": 4096}),
)
