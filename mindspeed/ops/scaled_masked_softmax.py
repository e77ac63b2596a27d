"""Softmax of scaled and masked attention scores in one operator that keeps its output only."""

# B batch, N heads, Q query positions, K key positions

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import row_blocks
from mindspeed.ops._registry import below_autograd, define, register_kernel

OP = "scaled_masked_softmax"


def scaled_masked_softmax(x: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False) -> Tensor:
    """`softmax(scale * x)` over the last dimension with excluded entries removed.

    x: [..., Q, K], float. mask: bool or uint8, broadcastable to x, True = excluded. `causal` excludes keys j > i as well. A row
    without any entry left gives zeros. Computed in float32, rounded once; keeps the output only.
    """
    _checks.tensor(OP, "x", x)
    _checks.require(OP, "x", x.dim() >= 2, "must have at least 2 dimensions", f"shape {tuple(x.shape)}")
    if mask is not None:
        _checks.tensor(OP, "mask", mask, (torch.bool, torch.uint8))
        padded = (1,) * (x.dim() - mask.dim()) + tuple(mask.shape)
        fits = mask.dim() <= x.dim() and all(size in (1, full) for size, full in zip(padded, x.shape, strict=True))
        _checks.require(OP, "mask", fits, f"must broadcast to x of shape {tuple(x.shape)}", f"shape {tuple(mask.shape)}")
        _checks.same_device(OP, x=x, mask=mask)
        mask = mask.view(padded).to(torch.bool)
    return torch.ops.mindspeed.scaled_masked_softmax(x, mask, scale, causal)


def _excluded(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if not causal:
        return mask
    upper = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return upper if mask is None else mask | upper


def _reference(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = x.to(_checks.wide_dtype(x)) * scale
    excluded = _excluded(x, mask, causal)
    if excluded is None:
        return torch.softmax(scores, -1).to(x.dtype).contiguous()
    y = torch.softmax(scores.masked_fill(excluded, float("-inf")), -1)
    return y.masked_fill(excluded.all(-1, keepdim=True), 0.0).to(x.dtype).contiguous()


def _reference_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    wide = _checks.wide_dtype(y)
    y_wide, dy_wide = y.to(wide), dy.to(wide)
    return (scale * y_wide * (dy_wide - (dy_wide * y_wide).sum(-1, keepdim=True))).to(y.dtype).contiguous()


class _ScaledMaskedSoftmax(torch.autograd.Function):
    """Keeps y."""

    @staticmethod
    def forward(ctx, x, mask, scale, causal):  # noqa: ANN001, ANN205
        y = below_autograd("scaled_masked_softmax", x, mask, scale, causal)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        return torch.ops.mindspeed.scaled_masked_softmax_backward(dy, *ctx.saved_tensors, ctx.scale), None, None, None


define(
    "scaled_masked_softmax(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
    family="scaled_masked_softmax",
    reference=_reference,
    fake=lambda x, mask, scale, causal: x.new_empty(x.shape),
    autograd=_ScaledMaskedSoftmax,
)
define(
    "scaled_masked_softmax_backward(Tensor dy, Tensor y, float scale) -> Tensor",
    family="scaled_masked_softmax",
    reference=_reference_backward,
    fake=lambda dy, y, scale: y.new_empty(y.shape),
)


@register_kernel("scaled_masked_softmax", "aten", devices=("cpu",))
def _blocked(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """A few query rows of one head at a time; a causal head is not computed above its diagonal."""
    queries, keys = x.shape[-2:]
    y = torch.empty(x.shape, dtype=x.dtype)
    x_heads, y_heads = x.reshape(-1, queries, keys), y.view(-1, queries, keys)
    masks = None if mask is None else mask.expand(*x.shape[:-2], *mask.shape[-2:])
    positions = torch.arange(max(queries, keys)) if causal else None
    lead = x.shape[:-2]
    for head in range(x_heads.shape[0]):
        head_mask = None
        if masks is not None:
            index = torch.unravel_index(torch.tensor(head), lead) if lead else ()
            head_mask = masks[index].expand(queries, keys)
        for block in row_blocks(queries, keys * 4):
            seen = min(keys, block.stop) if causal else keys
            work = x_heads[head, block, :seen].to(_checks.wide_dtype(x), copy=True).mul_(scale)
            excluded = None if head_mask is None else head_mask[block, :seen]
            if causal:
                upper = positions[None, :seen] > positions[block, None]
                excluded = upper if excluded is None else excluded | upper
            if excluded is not None:
                work.masked_fill_(excluded, float("-inf"))
            torch.softmax(work, -1, out=work)
            if mask is not None:
                work.masked_fill_(excluded.all(-1, keepdim=True), 0.0)
            y_heads[head, block, :seen] = work
            y_heads[head, block, seen:] = 0.0
    return y


@register_kernel("scaled_masked_softmax_backward", "aten", devices=("cpu",))
def _blocked_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    wide, keys = _checks.wide_dtype(y), y.shape[-1]
    dx = torch.empty(y.shape, dtype=y.dtype)
    y_rows, dy_rows, dx_rows = y.reshape(-1, keys), dy.reshape(-1, keys), dx.view(-1, keys)
    for block in row_blocks(y_rows.shape[0], keys * 4):
        y_wide, work = y_rows[block].to(wide), dy_rows[block].to(wide, copy=True)
        work.sub_(torch.linalg.vecdot(work, y_wide).unsqueeze(1)).mul_(y_wide)
        dx_rows[block] = work.mul_(scale)
    return dx
