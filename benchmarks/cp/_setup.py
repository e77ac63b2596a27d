"""One attention layer under any algorithm, on ranks of the pool."""

# tensors are [s, b, heads, d], this rank's share of S positions

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout, take
from mindspeed.core.context_parallel.plan import ContextPlan
from mindspeed.core.context_parallel.work import AttentionOptions


def whole_inputs(length: int, heads: int, groups: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output over the whole sequence, alike on all ranks."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(length, 1, n, dim, generator=generator).to(dtype) for n in (heads, groups, groups, heads)]


def share(tensors: list[Tensor], layout: SequenceLayout, rank: int) -> list[Tensor]:
    """This rank's positions, as leaves; the last tensor wants no gradient."""
    parts = [take(tensor, layout.index(rank), 0).contiguous() for tensor in tensors]
    return [part.requires_grad_() for part in parts[:-1]] + parts[-1:]


def attention(plan: ContextPlan, groups: ContextGroups, layout: SequenceLayout, dim: int) -> Callable[..., Tensor]:
    """The layer."""
    options = AttentionOptions(1 / math.sqrt(dim))
    return lambda q, k, v: context_attention(q, k, v, plan=plan, groups=groups, layout=layout, options=options)


def groups_of(plan: ContextPlan, world: Any) -> ContextGroups:
    """The plan's groups over all ranks of the world."""
    groups = ContextGroups()
    if plan.size > 1:
        groups.create(plan, world.group, overlap=False)
    return groups


def both_ways(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def relative(ours: Tensor, truth: Tensor) -> float:
    """Norm of the difference, relative to the truth's."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def error_on_rank(world: Any, plan: ContextPlan, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients of this rank's share against one device in fp32."""
    whole = whole_inputs(*sizes, dtype)
    alone = ContextPlan()
    leaves = [tensor.float().requires_grad_() for tensor in whole[:-1]]
    truth = both_ways(attention(alone, ContextGroups(), alone.layout(sizes[0]), sizes[3]), *leaves, whole[-1].float())
    layout, groups = plan.layout(sizes[0]), groups_of(plan, world)
    ours = both_ways(attention(plan, groups, layout, sizes[3]), *share(whole, layout, world.rank))
    groups.drop()
    expected = [take(tensor, layout.index(world.rank), 0) for tensor in truth]
    return max(relative(mine, true) for mine, true in zip(ours, expected, strict=True))
