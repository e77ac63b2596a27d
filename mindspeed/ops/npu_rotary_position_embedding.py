"""Rotary position embedding in one operator: `y = x * cos + R(x) * sin` with a quarter turn R of each pair."""

# D head size, R rotated part of it (R <= D, the tail is copied)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    return _rotated(x, cos, sin, mode, 1)


@register_kernel("rotary_backward", "aten", devices=("cpu",))
def _blocked_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    return _rotated(dy, cos, sin, mode, -1), *_table_gradients(dy, x, cos, mode)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, mode: int, sign: int) -> Tensor:
    """The rotation (sign 1) or its transpose (sign -1), in slices of the longest leading dimension, so that work stays in the cache.

    16-bit input is widened into a buffer and narrowed from another. Slices are views made once, by `split`: cutting a slice in
    Python costs as much as the arithmetic of a few thousand elements.
    """
    wide, size = _checks.wide_dtype(x), cos.shape[-1]
    y = fresh(x.shape, x.dtype)
    if size < x.shape[-1]:
        y[..., size:] = x[..., size:]
    head, target = x[..., :size], y[..., :size]
    turn = _complex_turn(cos, sin, wide, sign) if mode == INTERLEAVED else None
    turn = turn or _real_turn(cos, sin, wide, mode, sign)
    dim = max(range(3), key=lambda index: x.shape[index])
    step = block_rows(x.shape[dim], 4 * x.numel() // max(x.shape[dim], 1))
    tables = [_cut(table, dim, x.shape[dim], step) for table in turn.tables]
    if x.dtype == wide and turn.takes(head) and turn.takes(target):
        sides = [zip(*(view.split(step, dim) for view in turn.views(side)), strict=True) for side in (head, target)]
        for source, result, *table in zip(*sides, *tables, strict=True):
            turn.apply(source, result, *table)
        return y
    buffers = [torch.empty(*x.shape[:dim], step, *x.shape[dim + 1 : 3], size, dtype=wide) for _ in range(2)]
    views = [turn.views(buffer) for buffer in buffers]
    for source, result, *table in zip(head.split(step, dim), target.split(step, dim), *tables, strict=True):
        if source.shape[dim] < step:  # the last one
            buffers = [buffer.narrow(dim, 0, source.shape[dim]) for buffer in buffers]
            views = [turn.views(buffer) for buffer in buffers]
        buffers[0].copy_(source)
        turn.apply(*views, *table)
        result.copy_(buffers[1])
    return y


class _Turn(NamedTuple):
    """How slices are rotated: the views of a slice that `apply(x views, y views, *tables)` works on, and what it multiplies with."""

    tables: tuple[Tensor, ...]
    views: Callable[[Tensor], tuple[Tensor, ...]]
    apply: Callable[..., None]
    takes: Callable[[Tensor], bool]


def _real_turn(cos: Tensor, sin: Tensor, wide: torch.dtype, mode: int, sign: int) -> _Turn:
    first, second = _pair(mode, cos.shape[-1])

    def apply(x: tuple[Tensor, ...], y: tuple[Tensor, ...], cosine: Tensor, sine_first: Tensor, sine_second: Tensor) -> None:
        (whole, x_first, x_second), (out, out_first, out_second) = x, y
        torch.mul(whole, cosine, out=out)
        out_first.addcmul_(x_second, sine_first, value=-sign)
        out_second.addcmul_(x_first, sine_second, value=sign)

    sin = sin.to(wide)
    sines = (sin[first], sin[second]) if sign == 1 else (sin[second], sin[first])  # the transpose takes the partner's sine
    return _Turn((cos.to(wide), *sines), lambda value: (value, value[first], value[second]), apply, lambda value: True)


def _complex_turn(cos: Tensor, sin: Tensor, wide: torch.dtype, sign: int) -> _Turn | None:
    """Neighbours as complex numbers, one pass instead of three; None if the members of some pair have different angles."""
    if not all(torch.equal(table[..., 0::2], table[..., 1::2]) for table in (cos, sin)):
        return None
    table = torch.complex(cos[..., 0::2].to(wide), sin[..., 0::2].to(wide) * sign)

    def apply(x: tuple[Tensor, ...], y: tuple[Tensor, ...], factor: Tensor) -> None:
        torch.mul(x[0], factor, out=y[0])

    def viewable(value: Tensor) -> bool:
        return value.stride(-1) == 1 and all(step % 2 == 0 for step in (*value.stride()[:-1], value.storage_offset()))

    return _Turn((table,), lambda value: (torch.view_as_complex(value.unflatten(-1, (-1, 2))),), apply, viewable)


def _cut(table: Tensor, dim: int, size: int, step: int) -> Sequence[Tensor]:
    """Slices of a table for the slices of `size` rows; the same one for all if it is broadcast there."""
    return table.split(step, dim) if table.shape[dim] == size else [table] * -(-size // step)
