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
    """One exchange that gives this rank its heads of the whole sequence: [s, b, n, d] -> [u s, b, n / u, d].

    Messages hold each head's tokens one behind the other, and so do the results in memory: the attention kernel reads
    them faster than tokens with their heads side by side.
    """
    degree = dist.get_world_size(group)
    parts = [t.unflatten(2, (degree, -1)).permute(2, 1, 3, 0, 4) for t in tensors]
    received = exchange_parts(parts, group)  # each [u, b, n / u, s, d]
    return tuple(part.permute(1, 2, 0, 3, 4).flatten(2, 3).permute(2, 0, 1, 3) for part in received)


def scatter_sequence(tensors: tuple[Tensor, ...], group: ProcessGroup) -> tuple[Tensor, ...]:
    """The reverse exchange: all heads of this rank's piece of the sequence."""
    degree = dist.get_world_size(group)
    received = exchange_parts([t.unflatten(0, (degree, -1)) for t in tensors], group)  # each [u, s, b, n / u, d]
    return tuple(part.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in received)


def exchange_parts(parts: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Entry r of each part goes to rank r, in one message; entry r of the results came from rank r.

    Each tensor is copied once, into the message; the results are views of what was received.
    """
    degree, sizes = parts[0].shape[0], [part[0].numel() for part in parts]
    outgoing = parts[0].new_empty((degree, sum(sizes)))
    for slot, part in zip(outgoing.split(sizes, 1), parts, strict=True):
        slot.unflatten(1, part.shape[1:]).copy_(part)
    received = torch.empty_like(outgoing)
    dist.all_to_all_single(received, outgoing, group=group)
    return [slot.unflatten(1, part.shape[1:]) for slot, part in zip(received.split(sizes, 1), parts, strict=True)]
