"""Ulysses inside core attention: q, k and v of equally long pieces in one exchange, grouped heads repeated by need.

Activations are [s, b, heads, d] with s = S / (ring x u); u is the degree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def repeats_needed(groups: int, degree: int) -> int:
    """How often each key head must be repeated so that `degree` ranks get those that their query heads use."""
    return math.lcm(groups, degree) // groups


def sequence_to_heads(tensors: tuple[Tensor, ...], group: ProcessGroup) -> tuple[Tensor, ...]:
    """[s, b, n, d] of several tensors -> [u s, b, n / u, d], in one exchange; differentiable.

    Raises:
        ValueError: a head count does not divide by the degree.
    """
    degree = dist.get_world_size(group)
    for tensor in tensors:
        if tensor.shape[2] % degree:
            raise ValueError(f"ulysses: {tensor.shape[2]} heads do not divide by {degree} ranks")
    return tensors if degree == 1 else _SequenceToHeads.apply(group, *tensors)


def heads_to_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """[u s, b, n / u, d] -> [s, b, n, d]; differentiable."""
    return tensor if dist.get_world_size(group) == 1 else _HeadsToSequence.apply(group, tensor)


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return scatter_heads(tensors, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *scatter_sequence(grads, ctx.group)


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.group = group
        return scatter_sequence((tensor,), group)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, scatter_heads((grad,), ctx.group)[0]


def scatter_heads(tensors: tuple[Tensor, ...], group: ProcessGroup) -> tuple[Tensor, ...]:
    """One exchange that gives this rank its heads of the whole sequence."""
    degree = dist.get_world_size(group)
    shapes = [(t.shape[0], t.shape[1], t.shape[2] // degree, t.shape[3]) for t in tensors]
    # to rank r go the heads r n/u ... of every tensor
    parts = [t.unflatten(2, (degree, -1)).movedim(2, 0).reshape(degree, -1) for t in tensors]
    received = _exchanged(parts, group)
    sizes = [part.shape[1] for part in parts]
    return tuple(
        part.reshape(degree * shape[0], *shape[1:]) for part, shape in zip(received.split(sizes, 1), shapes, strict=True)
    )


def scatter_sequence(tensors: tuple[Tensor, ...], group: ProcessGroup) -> tuple[Tensor, ...]:
    """The reverse exchange: all heads of this rank's piece of the sequence."""
    degree = dist.get_world_size(group)
    shapes = [(t.shape[0] // degree, *t.shape[1:]) for t in tensors]
    parts = [t.reshape(degree, -1) for t in tensors]
    received = _exchanged(parts, group)
    sizes = [part.shape[1] for part in parts]
    return tuple(
        part.reshape(degree, *shape).movedim(0, 2).flatten(2, 3)
        for part, shape in zip(received.split(sizes, 1), shapes, strict=True)
    )


def _exchanged(parts: list[Tensor], group: ProcessGroup) -> Tensor:
    """Row r of the joined parts goes to rank r; row r of the result came from rank r."""
    outgoing = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)
    received = torch.empty_like(outgoing)
    dist.all_to_all_single(received, outgoing, group=group)
    return received
