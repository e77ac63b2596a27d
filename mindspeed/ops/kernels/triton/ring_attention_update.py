"""Merge of two attention results in Triton: tiles of (token, head) rows, weights from the softmax statistics in the same kernel."""

# S positions, B batch, N heads, D head size, T tokens of a packed batch

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops._softmax_statistics import block_index
from mindspeed.ops.kernels.triton._launch import Build, triton_body

TILE = 4096


@triton.jit
def _merge(
    prev_ptr, prev_max_ptr, prev_sum_ptr, cur_ptr, cur_max_ptr, cur_sum_ptr, out_ptr, max_ptr, sum_ptr, index_ptr,
    rows, size, copies, positions, batch, heads,
    SBH: tl.constexpr, INDEXED: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if SBH:  # rows are (s, b, n), statistics (b, n, s)
        head = row % heads
        statistics_row = ((row // heads % batch) * heads + head) * positions + row // heads // batch
    else:
        statistics_row = row
    if INDEXED:
        statistics_row = tl.load(index_ptr + row, mask=inside, other=0)
    copy = tl.arange(0, COPIES)[None, :]
    place = statistics_row[:, None] * copies + copy
    live = inside[:, None] & (copy < copies)
    lowest = float("-inf")
    prev_max = tl.load(prev_max_ptr + place, mask=live, other=lowest).to(tl.float32)
    cur_max = tl.load(cur_max_ptr + place, mask=live, other=lowest).to(tl.float32)
    top = tl.maximum(prev_max, cur_max)
    base = tl.where(top == lowest, 0.0, top)  # -inf - (-inf) would be NaN
    prev = tl.load(prev_sum_ptr + place, mask=live, other=0.0).to(tl.float32) * tl.exp(prev_max - base)
    cur = tl.load(cur_sum_ptr + place, mask=live, other=0.0).to(tl.float32) * tl.exp(cur_max - base)
    total = prev + cur
    tl.store(max_ptr + place, top, mask=live)
    tl.store(sum_ptr + place, total, mask=live)
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    prev_weight = tl.sum(tl.where(copy == 0, prev * scale, 0.0), 1)[:, None]
    cur_weight = tl.sum(tl.where(copy == 0, cur * scale, 0.0), 1)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    element = row[:, None] * size + cols
    within = inside[:, None] & (cols < size)
    merged = tl.load(prev_ptr + element, mask=within, other=0.0).to(tl.float32) * prev_weight
    merged += tl.load(cur_ptr + element, mask=within, other=0.0).to(tl.float32) * cur_weight
    tl.store(out_ptr + element, merged, mask=within)


@triton_body("ring_attention_update")
def ring_attention_update(
    prev_out: Tensor, prev_max: Tensor, prev_sum: Tensor, cur_out: Tensor, cur_max: Tensor, cur_sum: Tensor,
    actual_seq_qlen: Tensor | None, layout: str, softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(out, max, sum)` over both key sets."""
    inputs = [value.contiguous() for value in (prev_out, prev_max, prev_sum, cur_out, cur_max, cur_sum)]
    results = [torch.empty(value.shape, dtype=value.dtype, device=value.device) for value in inputs[:3]]
    sbh, copies = layout == "SBH", prev_max.shape[-1]
    heads = prev_max.shape[1]
    rows = prev_max.numel() // copies
    size = prev_out.numel() // rows
    index = results[0]
    if actual_seq_qlen is not None:
        index = block_index(actual_seq_qlen.diff(), *prev_max.shape[:2])
    block = triton.next_power_of_2(size)
    tile = max(1, TILE // block)
    _merge[(triton.cdiv(rows, tile),)](
        *inputs, *results, index, rows, size, copies, prev_out.shape[0], prev_out.shape[1] if sbh else 1, heads,
        SBH=sbh, INDEXED=actual_seq_qlen is not None, ROWS=tile, COPIES=triton.next_power_of_2(copies), BLOCK=block,
    )  # fmt: skip
    return tuple(results)


_TYPES = "*bf16 *fp32 *fp32 *bf16 *fp32 *fp32 *bf16 *fp32 *fp32 *i64 i32 i32 i32 i32 i32 i32"
BUILDS = tuple(
    Build(_merge, _TYPES, {"SBH": sbh, "INDEXED": not sbh, "ROWS": 32, "COPIES": 8, "BLOCK": 128}) for sbh in (True, False)
)
