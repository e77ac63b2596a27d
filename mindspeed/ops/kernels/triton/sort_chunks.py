"""Chunks of rows in another order: each program finds the source of its row from the sizes on the device."""

# R rows, C chunks

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._launch import Build, triton_body

COLUMNS = 1024
CHUNKS = 8192
"""Most chunks that one program looks through."""


@triton.jit
def _move(x_ptr, sizes_ptr, starts_ptr, order_ptr, y_ptr, x_stride, size, chunks, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_C)
    chunk = tl.load(order_ptr + index, mask=index < chunks, other=0)
    sizes = tl.load(sizes_ptr + chunk, mask=index < chunks, other=0)
    ends = tl.cumsum(sizes, 0)
    here = (row >= ends - sizes) & (row < ends)
    source = tl.sum(tl.where(here, tl.load(starts_ptr + chunk, mask=index < chunks, other=0) + row - ends + sizes, 0), 0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + row * size + cols, tl.load(x_ptr + source * x_stride + cols, mask=cols < size), mask=cols < size)


def _declines(x: Tensor, split_sizes: Tensor, order: Tensor) -> str | None:
    if x.dtype.is_complex:
        return f"dtype {x.dtype}"
    return None if 0 < order.numel() <= CHUNKS else f"{order.numel()} chunks"


@triton_body("sort_chunks", declines=_declines)
def sort_chunks(x: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    """Forward; backward is the same with the inverse order."""
    x_rows = x.reshape(x.shape[0], -1)
    x_rows = x_rows if x_rows.stride(1) == 1 or x_rows.shape[1] == 1 else x_rows.contiguous()
    rows, size = x_rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(COLUMNS, triton.next_power_of_2(size))
    source, target = (value.view(torch.uint8) if value.dtype == torch.bool else value for value in (x_rows, y))
    _move[(rows, triton.cdiv(size, block))](
        source, split_sizes, split_sizes.cumsum(0) - split_sizes, order, target, x_rows.stride(0), size, order.numel(),
        BLOCK_C=triton.next_power_of_2(order.numel()), BLOCK=block,
    )  # fmt: skip
    return y


BUILDS = (Build(_move, "*bf16 *i64 *i64 *i64 *bf16 i64 i32 i32", {"BLOCK_C": 64, "BLOCK": COLUMNS}),)
