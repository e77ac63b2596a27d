"""Vocabulary-parallel cross entropy in Triton: a row at a time forward, in one pass over it; blocks of a row backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.cross_entropy import IGNORED, joined
from mindspeed.ops.kernels.triton._launch import Build, as_rows, triton_body

FORWARD_COLUMNS, BACKWARD_COLUMNS = 8192, 4096


@triton.jit
def _forward(x_ptr, target_ptr, top_ptr, total_ptr, picked_ptr, x_stride, columns, first, BLOCK: tl.constexpr):
    """Maximum, sum of `exp(x - maximum)` and logit of the target (0 if another shard has it) of a row."""
    row = tl.program_id(0).to(tl.int64)
    base = x_ptr + row * x_stride
    top = -float("inf")
    lanes = tl.zeros([BLOCK], dtype=tl.float32)  # sums of each lane: one reduction a block is enough, that of the maximum
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(base + cols, mask=cols < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)  # of nothing but -inf the sum is 0, not NaN
        lanes = lanes * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    column = tl.load(target_ptr + row) - first
    inside = (column >= 0) & (column < columns)
    picked = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, tl.sum(lanes, 0))
    tl.store(picked_ptr + row, picked)


@triton.jit
def _backward(
    dloss_ptr,
    x_ptr,
    target_ptr,
    top_ptr,
    total_ptr,
    dx_ptr,
    x_stride,
    columns,
    first,
    NOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < columns
    target = tl.load(target_ptr + row)
    g = tl.where(target == NOTHING, 0.0, tl.load(dloss_ptr + row).to(tl.float32))
    top = tl.load(top_ptr + row)
    total = tl.load(total_ptr + row)
    x = tl.load(x_ptr + row * x_stride + cols, mask=live, other=-float("inf")).to(tl.float32)
    softmax = tl.exp(x - top) / total
    dx = tl.where(cols == target - first, softmax - 1.0, softmax) * g
    tl.store(dx_ptr + row * columns + cols, dx, mask=live)


@triton_body("vocab_parallel_cross_entropy")
def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, first: int, group: str) -> tuple[Tensor, Tensor]:
    """Forward: one kernel, and what joins the shards."""
    rows, columns = as_rows(logits), logits.shape[-1]
    out = torch.empty((3, *target.shape), dtype=torch.float32, device=logits.device)
    block = min(FORWARD_COLUMNS, triton.next_power_of_2(columns))
    _forward[(rows.shape[0],)](
        rows, target.contiguous(), *out, rows.stride(0), columns, first, BLOCK=block, num_warps=_warps(block)
    )
    return joined(*out, target, group)


@triton_body("vocab_parallel_cross_entropy_backward")
def vocab_parallel_cross_entropy_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, first: int
) -> Tensor:
    """Gradient of logits."""
    rows, columns = as_rows(logits), logits.shape[-1]
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    block = min(BACKWARD_COLUMNS, triton.next_power_of_2(columns))
    _backward[(rows.shape[0], triton.cdiv(columns, block))](
        dloss.contiguous(), rows, target.contiguous(), *statistics.contiguous(), dlogits, rows.stride(0), columns, first,
        NOTHING=IGNORED, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dlogits


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


BUILDS = (
    Build(_forward, "*bf16 *i64 *fp32 *fp32 *fp32 i64 i32 i64", {"BLOCK": FORWARD_COLUMNS}, {"num_warps": 16}),
    Build(
        _backward, "*fp32 *bf16 *i64 *fp32 *fp32 *bf16 i64 i32 i64", {"NOTHING": IGNORED, "BLOCK": BACKWARD_COLUMNS},
        {"num_warps": 8},
    ),
)  # fmt: skip
