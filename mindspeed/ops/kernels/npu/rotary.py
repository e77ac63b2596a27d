"""Rotary embedding through `npu_rotary_mul`."""

# D head size, R rotated part of it

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take
from mindspeed.ops.npu_rotary_position_embedding import INTERLEAVED, back

MODES = ("half", "interleave")
AXES = ((0, 1), (0, 2), (1, 2))
"""Batch and head axis of the layouts that the kernel knows: BNSD, BSND, SBND."""


def _layouts(x: Tensor, cos: Tensor, mode: int) -> Iterator[tuple[int, int]]:
    """(batch, heads) of each layout that these shapes may mean.

    cos and sin lack batch and heads, only the heads, or nothing; with interleaved pairs always both.
    """
    short = {axis for axis in range(3) if cos.shape[axis] == 1}
    needed = {axis for axis in short if x.shape[axis] > 1}
    for batch, heads in AXES:
        lacking = ({batch, heads},) if mode == INTERLEAVED else ({batch, heads}, {heads}, set())
        if any(needed <= lacks <= short for lacks in lacking):
            yield x.shape[batch], x.shape[heads]


def _declines(x: Tensor, cos: Tensor, mode: int, table_gradients: bool) -> str | None:
    if reason := cannot_take("npu_rotary_mul", x):
        return reason
    fits = list(_layouts(x, cos, mode))
    if cos.shape[-1] == 0 or not fits:
        return f"cos of shape {tuple(cos.shape)} is no layout of npu_rotary_mul for x of shape {tuple(x.shape)}"
    fits = [
        (batch, heads) for batch, heads in fits if max(batch, heads) < 1000 and (mode != INTERLEAVED or batch * heads < 1000)
    ]
    if cos.shape[-1] >= 896 or not fits:
        return f"x of shape {tuple(x.shape)} is beyond the limits of npu_rotary_mul"
    if table_gradients and all(batch * heads > 1024 for batch, heads in fits):
        return f"x of shape {tuple(x.shape)} is beyond the limits of npu_rotary_mul_backward with gradients of cos and sin"
    return None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    size = cos.shape[-1]
    y = torch_npu.npu_rotary_mul(x[..., :size], cos.to(x.dtype), sin.to(x.dtype), rotary_mode=MODES[mode])
    return y if size == x.shape[-1] else torch.cat([y, x[..., size:]], -1)


@register_kernel("rotary", "npu", devices=("npu",), declines=lambda x, cos, sin, mode: _declines(x, cos, mode, False))
def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    """Forward."""
    return _rotate(x, cos, sin, mode)


@register_kernel(
    "rotary_backward",
    "npu",
    devices=("npu",),
    declines=lambda dy, x, cos, sin, mode: _declines(dy, cos, mode, x is not None),
)
def rotary_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x by the forward kernel with turned sines; gradients of cos and sin only if x was kept for them."""
    if x is None:
        return _rotate(dy, cos, back(sin, mode), mode), cos.new_empty(0), cos.new_empty(0)
    size = cos.shape[-1]
    dx, dcos, dsin = torch_npu.npu_rotary_mul_backward(
        dy[..., :size].contiguous(), x[..., :size].contiguous(), cos.to(x.dtype), sin.to(x.dtype), rotary_mode=MODES[mode]
    )
    dx = dx if size == dy.shape[-1] else torch.cat([dx, dy[..., size:]], -1)
    return dx, dcos.to(cos.dtype), dsin.to(sin.dtype)
