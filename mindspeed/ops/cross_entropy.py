"""Cross entropy of logits whose vocabulary may be split over a tensor-parallel group, in one operator."""

# T tokens (all leading dimensions), V entries of the vocabulary on this rank, P ranks of the group; a shard is [first, first + V)

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import block_rows, fresh, row_blocks, widen
from mindspeed.ops._registry import below_autograd, define, on_host, register_kernel, strict
from mindspeed.ops.comm import comm_name, resolve

OP = "vocab_parallel_cross_entropy"
IGNORED = -100
"""Target of a position without one, as in torch: its loss and the gradient of its logits are zero."""

BLOCK_BYTES = 2 << 20
"""Size of the CPU body's one buffer; rows of a vocabulary are long, and 1 MiB holds so few that the calls per block show."""

LOG2_E = math.log2(math.e)


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup | str | None = None) -> Tensor:
    """`log(sum(exp(logits))) - logits[target]` for every position, over the vocabularies of all ranks of `group`.

    logits: [..., V], float; this rank's part of the vocabulary, parts of one size in the order of ranks. target: [...], int64,
    entries of the whole vocabulary, the same on all ranks; -100 stands for no target and gives a loss of 0.
    group: process group or its name; None if logits hold the whole vocabulary. Returns [...] in float32 (float64 for float64).

    All arithmetic is float32; the gradient is rounded once, to the dtype of logits. Keeps logits, target and two numbers a row,
    never a softmax. Two collectives forward (maxima; sums together with the targets' logits), none backward.
    Source: Shoeybi et al. 2019, section 3. Raises TypeError, ValueError or RuntimeError naming the argument; a target beyond the
    vocabulary is found on the CPU, elsewhere under `MINDSPEED_OPS_STRICT=1`.
    """
    _checks.tensor(OP, "logits", logits)
    _checks.tensor(OP, "target", target, (torch.int64,))
    _checks.require(OP, "logits", logits.dim() >= 1, "must have at least 1 dimension", f"shape {tuple(logits.shape)}")
    _checks.require(OP, "logits", logits.shape[-1] > 0, "must have at least 1 column", f"shape {tuple(logits.shape)}")
    _checks.shape(OP, "target", target, logits.shape[:-1])
    _checks.same_device(OP, logits=logits, target=target)
    rank, ranks, name = _place(group)
    columns = logits.shape[-1]
    _check_targets(target, columns * ranks)
    return torch.ops.mindspeed.vocab_parallel_cross_entropy(logits, target, rank * columns, name)[0]


def _place(group: dist.ProcessGroup | str | None) -> tuple[int, int, str]:
    """This rank in the group, the group's size, and its name; no name where there is nobody to talk to."""
    if group is None:
        return 0, 1, ""
    live = resolve(OP, "group", group)
    return live.rank(), live.size(), comm_name(live) if live.size() > 1 else ""


def _check_targets(target: Tensor, vocabulary: int) -> None:
    """Find targets outside of the whole vocabulary, where looking costs no synchronisation or was asked for."""
    if target.numel() == 0 or not (on_host(target) or strict()):
        return
    wrong = (target >= vocabulary) | ((target < 0) & (target != IGNORED))
    if wrong.any():
        rule = f"must hold entries of the vocabulary, 0 to {vocabulary - 1}, or {IGNORED} for none"
        _checks.require(OP, "target", False, rule, target[wrong][0].item())


def in_shard(target: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where the target lies in this rank's shard, and its column there (0 elsewhere)."""
    column = target - first
    inside = (column >= 0) & (column < columns)
    return inside, column.masked_fill(~inside, 0)


def joined(top: Tensor, total: Tensor, picked: Tensor, target: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Loss [T] and statistics [2, T] from one shard's maxima, sums of `exp(x - top)` and logits of targets (0 elsewhere).

    All three are wide and of the shape of target. A shard whose row is all -inf has `top` -inf and a sum of 0.
    """
    if group:
        live, local = resolve(OP, "group", group), top
        top = top.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=live)
        packed = torch.stack((total * (local - top).exp(), picked))
        dist.all_reduce(packed, group=live)
        total, picked = packed
    loss = (total.log() - (picked - top)).masked_fill_(target == IGNORED, 0.0)
    return loss, torch.stack((top, total))


def safe(top: Tensor) -> Tensor:
    """Maxima to subtract: 0 for a row of -inf, whose exponentials are then 0 and not NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def _reference(logits: Tensor, target: Tensor, first: int, group: str) -> tuple[Tensor, Tensor]:
    wide = logits.to(_checks.wide_dtype(logits))
    inside, column = in_shard(target, first, logits.shape[-1])
    top = wide.amax(-1)
    total = (wide - safe(top).unsqueeze(-1)).exp().sum(-1)
    picked = wide.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill(~inside, 0.0)
    return joined(top, total, picked, target, group)


def _reference_backward(dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, first: int) -> Tensor:
    top, total = statistics
    wide = logits.to(statistics.dtype)
    inside, column = in_shard(target, first, logits.shape[-1])
    softmax = (wide - top.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    column = column.unsqueeze(-1)
    softmax = softmax.scatter(-1, column, softmax.gather(-1, column) - inside.to(softmax.dtype).unsqueeze(-1))
    g = dloss.to(statistics.dtype).masked_fill(target == IGNORED, 0.0)
    return (softmax * g.unsqueeze(-1)).to(logits.dtype).contiguous()


def _fake(logits: Tensor, target: Tensor, first: int, group: str) -> tuple[Tensor, Tensor]:
    wide = _checks.wide_dtype(logits)
    return logits.new_empty(target.shape, dtype=wide), logits.new_empty((2, *target.shape), dtype=wide)


class _CrossEntropy(torch.autograd.Function):
    """Keeps logits, target and statistics."""

    @staticmethod
    def forward(ctx, logits, target, first, group):  # noqa: ANN001, ANN205
        loss, statistics = below_autograd("vocab_parallel_cross_entropy", logits, target, first, group)
        ctx.save_for_backward(logits, target, statistics)
        ctx.first = first
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return loss, statistics

    @staticmethod
    def backward(ctx, dloss, _dstatistics):  # noqa: ANN001, ANN205
        if dloss is None:
            return None, None, None, None
        dlogits = torch.ops.mindspeed.vocab_parallel_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.first)
        return dlogits, None, None, None


define(
    "vocab_parallel_cross_entropy(Tensor logits, Tensor target, int first, str group) -> (Tensor loss, Tensor statistics)",
    family="cross_entropy",
    reference=_reference,
    fake=_fake,
    autograd=_CrossEntropy,
)
define(
    "vocab_parallel_cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor statistics, int first) -> Tensor",
    family="cross_entropy",
    reference=_reference_backward,
    fake=lambda dloss, logits, target, statistics, first: logits.new_empty(logits.shape),
)


def _exponentials(x: Tensor, top: Tensor, out: Tensor) -> Tensor:
    """`exp(x - top)` of rows x [R, V], top [R, 1]. On CPU torch's exp2 takes 0.4 of the time of exp, and no less exact."""
    torch.sub(x, top, out=out)
    return out.mul_(LOG2_E).exp2_()


@register_kernel("vocab_parallel_cross_entropy", "aten", devices=("cpu",))
def _blocked(logits: Tensor, target: Tensor, first: int, group: str) -> tuple[Tensor, Tensor]:
    wide, columns = _checks.wide_dtype(logits), logits.shape[-1]
    rows = logits.reshape(-1, columns)
    count, row_bytes = rows.shape[0], columns * 4
    inside, column = in_shard(target.reshape(-1, 1), first, columns)
    top, total, picked = torch.empty(3, count, 1, dtype=wide)
    buffer = torch.empty(block_rows(count, row_bytes, BLOCK_BYTES), columns, dtype=wide)
    for block in row_blocks(count, row_bytes, BLOCK_BYTES):
        x = widen(rows[block], buffer)
        torch.amax(x, 1, keepdim=True, out=top[block])
        torch.gather(x, 1, column[block], out=picked[block])
        torch.sum(_exponentials(x, safe(top[block]), buffer[: x.shape[0]]), 1, keepdim=True, out=total[block])
    picked.masked_fill_(~inside, 0.0)
    return joined(*(value.view(target.shape) for value in (top, total, picked)), target, group)


@register_kernel("vocab_parallel_cross_entropy_backward", "aten", devices=("cpu",))
def _blocked_backward(dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, first: int) -> Tensor:
    wide, columns = statistics.dtype, logits.shape[-1]
    rows, flat = logits.reshape(-1, columns), target.reshape(-1, 1)
    count, row_bytes = rows.shape[0], columns * 4
    inside, column = in_shard(flat, first, columns)
    top, total = statistics.reshape(2, count, 1)
    g, hit = dloss.reshape(-1, 1).to(wide).masked_fill(flat == IGNORED, 0.0), inside.to(wide)
    dlogits = fresh(logits.shape, logits.dtype)
    targets = dlogits.view(count, columns)
    buffer = None
    if logits.dtype != wide:
        buffer = torch.empty(block_rows(count, row_bytes, BLOCK_BYTES), columns, dtype=wide)
    for block in row_blocks(count, row_bytes, BLOCK_BYTES):
        out = targets[block] if buffer is None else buffer[: block.stop - block.start]
        x = rows[block] if buffer is None else widen(rows[block], buffer)
        e, here = _exponentials(x, top[block], out), column[block]
        # (p - 1) g, not p g - g: near p = 1 the difference of the products would be rounding errors alone
        picked = e.gather(1, here).div_(total[block]).sub_(hit[block]).mul_(g[block])
        e.mul_(g[block] / total[block]).scatter_(1, here, picked)
        if buffer is not None:
            targets[block].copy_(e)
    return dlogits
