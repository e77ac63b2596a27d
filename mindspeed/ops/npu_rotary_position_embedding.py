"""Rotary position embedding in one operator: `y = x * cos + R(x) * sin` with a quarter turn R of each pair."""

# D head size, R rotated part of it (R <= D, the tail is copied)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import block_rows, fresh
from mindspeed.ops._registry import below_autograd, define, register_kernel

OP = "npu_rotary_position_embedding"
HALF, INTERLEAVED = 0, 1


def npu_rotary_position_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int = 0) -> Tensor:
    """Rotate pairs of `x` by the angles whose cosines and sines are given.

    x: 4-D, any layout (BNSD, BSND, SBND), float. cos, sin: 4-D, equal shapes that broadcast to x, float; their last size R is
    even and at most that of x: the rest of the head is passed through. mode 0 pairs the halves of the head (i, i + R/2),
    mode 1 its neighbours (2i, 2i+1). Products are float32, rounded once. Keeps cos and sin, and x only if one of them
    requires a gradient. Source: Su et al. 2021.
    """
    _checks.tensor(OP, "x", x, ndim=4)
    for name, value in (("cos", cos), ("sin", sin)):
        _checks.tensor(OP, name, value, ndim=4)
    _checks.shape(OP, "sin", sin, cos.shape)
    leading = zip(cos.shape[:3], x.shape[:3], strict=True)
    _checks.require(
        OP,
        "cos and sin",
        all(size in (1, full) for size, full in leading) and cos.shape[3] <= x.shape[3],
        f"must broadcast to x of shape {tuple(x.shape)}",
        f"shape {tuple(cos.shape)}",
    )
    _checks.require(OP, "cos and sin", cos.shape[3] % 2 == 0, "must have an even last size", f"shape {tuple(cos.shape)}")
    _checks.option(OP, "mode", mode, (HALF, INTERLEAVED))
    _checks.same_device(OP, x=x, cos=cos, sin=sin)
    return torch.ops.mindspeed.rotary(x, cos, sin, mode)


def _pair(mode: int, size: int) -> tuple[tuple[Any, slice], tuple[Any, slice]]:
    """Where the first and the second members of the pairs are in the last dimension."""
    if mode == HALF:
        return (..., slice(0, size // 2)), (..., slice(size // 2, None))
    return (..., slice(0, None, 2)), (..., slice(1, None, 2))


def _turned(x: Tensor, mode: int) -> Tensor:
    """R(x): a quarter turn of each pair."""
    if mode == HALF:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)


def _reference(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    wide, size = _checks.wide_dtype(x), cos.shape[-1]
    head = x[..., :size].to(wide)
    head = (head * cos.to(wide) + _turned(head, mode) * sin.to(wide)).to(x.dtype)
    return torch.cat([head, x[..., size:]], -1) if size < x.shape[-1] else head.contiguous()


def back(sin: Tensor, mode: int) -> Tensor:
    """The sines with which the forward formula computes the gradient: those of the partner in each pair, negated."""
    if mode == HALF:
        first, second = sin.chunk(2, -1)
        return torch.cat([-second, -first], -1)
    return torch.stack([-sin[..., 1::2], -sin[..., 0::2]], -1).flatten(-2)


def _table_gradients(dy: Tensor, x: Tensor | None, cos: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    if x is None:
        return cos.new_empty(0), cos.new_empty(0)
    wide, size = _checks.wide_dtype(x), cos.shape[-1]
    dy, head = dy[..., :size].to(wide), x[..., :size].to(wide)
    sums = ((dy * value).sum_to_size(cos.shape).to(cos.dtype) for value in (head, _turned(head, mode)))
    return tuple(value.contiguous() for value in sums)


def _reference_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    return _reference(dy, cos, back(sin, mode), mode), *_table_gradients(dy, x, cos, mode)


def _fake_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = 0 if x is None else cos.shape
    return dy.new_empty(dy.shape), cos.new_empty(shape), cos.new_empty(shape)


class _Rotary(torch.autograd.Function):
    """Keeps cos and sin; x only for a gradient of one of them."""

    @staticmethod
    def forward(ctx, x, cos, sin, mode):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None, cos, sin)
        ctx.mode = mode
        return below_autograd("rotary", x, cos, sin, mode)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        x, cos, sin = ctx.saved_tensors
        grads = torch.ops.mindspeed.rotary_backward(dy, x, cos, sin, ctx.mode)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), None


define(
    "rotary(Tensor x, Tensor cos, Tensor sin, int mode) -> Tensor",
    family="rotary",
    reference=_reference,
    fake=lambda x, cos, sin, mode: x.new_empty(x.shape),
    autograd=_Rotary,
)
define(
    "rotary_backward(Tensor dy, Tensor? x, Tensor cos, Tensor sin, int mode) -> (Tensor dx, Tensor dcos, Tensor dsin)",
    family="rotary",
    reference=_reference_backward,
    fake=_fake_backward,
)


@register_kernel("rotary", "aten", devices=("cpu",))
def _blocked(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    """Slices of the longest leading dimension, so that float32 work stays in the cache."""
    wide, size = _checks.wide_dtype(x), cos.shape[-1]
    y = fresh(x.shape, x.dtype)
    head, target = x[..., :size], y[..., :size]
    dim = max(range(3), key=lambda index: x.shape[index])
    step = block_rows(x.shape[dim], 4 * x.numel() // max(x.shape[dim], 1))
    shape = [*x.shape[:dim], step, *x.shape[dim + 1 : 3], size]
    x_buffer, y_buffer = (torch.empty(shape, dtype=wide) for _ in range(2))
    first, second = _pair(mode, size)
    pieces = [(head, target, cos.to(wide), sin.to(wide))]
    if step < x.shape[dim]:  # cutting costs more than the arithmetic of a small tensor
        long = (value.expand(*value.shape[:dim], x.shape[dim], *value.shape[dim + 1 :]) for value in pieces[0])
        pieces = zip(*(value.split(step, dim) for value in long), strict=True)
    for source, result, cosine, sine in pieces:
        n = source.shape[dim]
        source = source if source.dtype == wide else x_buffer.narrow(dim, 0, n).copy_(source)
        out = torch.mul(source, cosine, out=result if result.dtype == wide else y_buffer.narrow(dim, 0, n))
        out[first].addcmul_(source[second], sine[first], value=-1)
        out[second].addcmul_(source[first], sine[second])
        if out is not result:
            result.copy_(out)
    if size < x.shape[-1]:
        y[..., size:] = x[..., size:]
    return y


@register_kernel("rotary_backward", "aten", devices=("cpu",))
def _blocked_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    return _blocked(dy, cos, back(sin, mode), mode), *_table_gradients(dy, x, cos, mode)
