"""Vocabulary-parallel cross entropy from aten kernels of torch_npu, a block of rows at a time.

`npu_cross_entropy_loss` serves neither a split vocabulary nor long rows: it returns all log-probabilities. The blocks bound what is
held in float32, and no step reads a value on the host: the target is taken by gather and put back by scatter, not by a mask.
"""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401 - registers the kernels
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.cross_entropy import IGNORED, in_shard, joined, safe
from mindspeed.ops.kernels.npu._versions import cannot_take

BLOCK_BYTES = 256 << 20
"""What a block takes in float32: few launches, and little beside the logits of a large vocabulary."""


def _declines(logits: Tensor) -> str | None:
    return cannot_take("exp", logits)


@register_kernel("vocab_parallel_cross_entropy", "npu", devices=("npu",), declines=lambda logits, *_: _declines(logits))
def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, first: int, group: str) -> tuple[Tensor, Tensor]:
    """Forward."""
    columns = logits.shape[-1]
    rows = logits.reshape(-1, columns)
    inside, column = in_shard(target.reshape(-1, 1), first, columns)
    top, total, picked = torch.empty(3, rows.shape[0], 1, dtype=torch.float32, device=logits.device)
    for block in _blocks(*rows.shape):
        x = rows[block].to(torch.float32)
        top[block] = x.amax(1, keepdim=True)
        picked[block] = x.gather(1, column[block])
        total[block] = (x - safe(top[block])).exp_().sum(1, keepdim=True)
    picked.masked_fill_(~inside, 0.0)
    return joined(*(value.view(target.shape) for value in (top, total, picked)), target, group)


@register_kernel("vocab_parallel_cross_entropy_backward", "npu", devices=("npu",), declines=lambda _, x, *__: _declines(x))
def vocab_parallel_cross_entropy_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, first: int
) -> Tensor:
    """Gradient of logits."""
    columns = logits.shape[-1]
    rows, flat = logits.reshape(-1, columns), target.reshape(-1, 1)
    inside, column = in_shard(flat, first, columns)
    top, total = statistics.reshape(2, -1, 1)
    g, hit = dloss.reshape(-1, 1).to(torch.float32).masked_fill(flat == IGNORED, 0.0), inside.to(torch.float32)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    targets = dlogits.view(rows.shape)
    for block in _blocks(*rows.shape):
        softmax = (rows[block].to(torch.float32) - top[block]).exp_().div_(total[block])
        softmax.scatter_(1, column[block], softmax.gather(1, column[block]) - hit[block])
        targets[block].copy_(softmax.mul_(g[block]))
    return dlogits


def _blocks(count: int, columns: int) -> list[slice]:
    step = max(1, BLOCK_BYTES // (columns * 4))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
