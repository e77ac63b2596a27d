"""Attention whose queries stay while keys and values of the whole sequence are brought together.

How they are brought together is a value: an exchange of heads (Ulysses) or an all-gather along the sequence. What is
kept for backward is another: the keys and values as gathered, or the local ones, gathered again in backward, which
saves memory for traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed.core.attention import Accumulator, GradientSum
from mindspeed.core.attention.contract import statistics_dtype
from mindspeed.core.context_parallel.ulysses import repeats_needed, scatter_heads, scatter_sequence
from mindspeed.core.context_parallel.work import Work, backward_block, forward_block

KEEP = {"gathered": (True, True), "half": (False, True), "local": (False, False)}  # keep gathered (keys, values)?


class Move(Protocol):
    """Brings local keys or values [s, b, g, d] to the queries, and gradients back."""

    def gather(self, local: Tensor) -> Tensor:
        """[S, b, heads, d] in the order that the plan of work expects."""
        ...

    def reduce(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's [s, b, g, d] of the summed gradient, in this dtype."""
        ...


@dataclass(frozen=True)
class HeadMove:
    """Ulysses: heads are scattered, the sequence is gathered; grouped heads are repeated by need."""

    group: ProcessGroup
    groups: int  # key heads before repetition

    def gather(self, local: Tensor) -> Tensor:
        """See `Move`."""
        repeats = repeats_needed(self.groups, dist.get_world_size(self.group))
        return scatter_heads((local.repeat_interleave(repeats, 2) if repeats > 1 else local,), self.group)[0]

    def reduce(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Move`; copies of a head are summed."""
        whole = scatter_sequence((gradient.to(dtype),), self.group)[0]
        repeats = whole.shape[2] // self.groups
        return whole.unflatten(2, (self.groups, repeats)).sum(3) if repeats > 1 else whole


@dataclass(frozen=True)
class SequenceMove:
    """All-gather along the sequence; `order` are the places of gathered tokens in the order of global positions."""

    group: ProcessGroup
    order: Tensor | None = None

    def gather(self, local: Tensor) -> Tensor:
        """See `Move`."""
        whole = local.new_empty((local.shape[0] * dist.get_world_size(self.group), *local.shape[1:]))
        dist.all_gather_into_tensor(whole, local.contiguous(), group=self.group)
        return whole if self.order is None else whole.index_select(0, self.order)

    def reduce(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Move`; the sum over ranks is taken in fp32."""
        gradient = gradient.to(statistics_dtype(dtype))
        if self.order is not None:
            gradient = torch.empty_like(gradient).index_copy_(0, self.order, gradient)
        part = gradient.new_empty((gradient.shape[0] // dist.get_world_size(self.group), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(part, gradient.contiguous(), group=self.group)
        return part.to(dtype)


@dataclass(frozen=True)
class GatheredPlan:
    """How keys come, what is computed, what is kept ("gathered", "half": values only, "local")."""

    move: Move
    work: tuple[Work, ...]
    keep: str = "gathered"


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, plan: GatheredPlan) -> Tensor:
    """Attention of q [s_q, b, n, d] over all keys, from local k [s, b, g, d] and v [s, b, g, dv]; differentiable.

    Returns:
        [s_q, b, n, dv] in q's dtype.
    """
    return _GatheredAttention.apply(q, k, v, plan)


def heads_first(tensor: Tensor) -> Tensor:
    """[s, b, heads, d] -> [b, heads, s, d], a view."""
    return tensor.permute(1, 2, 0, 3)


def sequence_first(tensor: Tensor) -> Tensor:
    """[b, heads, s, d] -> [s, b, heads, d], a view."""
    return tensor.permute(2, 0, 1, 3)


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: GatheredPlan) -> Tensor:
        query = heads_first(q)
        key, value = plan.move.gather(k), plan.move.gather(v)
        total = Accumulator(query, v.shape[-1])
        ctx.states = forward_block(query, heads_first(key), heads_first(value), plan.work, total)
        out = total.out.to(q.dtype)
        ctx.plan = plan
        kept = [whole if keep else local for whole, local, keep in zip((key, value), (k, v), KEEP[plan.keep], strict=True)]
        ctx.save_for_backward(q, *kept, out, total.lse)
        return sequence_first(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, key, value, out, lse = ctx.saved_tensors
        plan: GatheredPlan = ctx.plan
        keep_key, keep_value = KEEP[plan.keep]
        key = key if keep_key else plan.move.gather(key)
        value = value if keep_value else plan.move.gather(value)
        query = heads_first(q)
        dq = GradientSum(query)
        saved = (heads_first(grad_out), query, out, lse)
        dk, dv = backward_block(saved, heads_first(key), heads_first(value), plan.work, ctx.states, dq)
        dk, dv = (plan.move.reduce(sequence_first(gradient.total), q.dtype) for gradient in (dk, dv))
        return sequence_first(dq.total).to(q.dtype), dk, dv, None
