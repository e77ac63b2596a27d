"""Attention of one layer under any context-parallel algorithm: the algorithm is a value, the call is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed.core.context_parallel.adaptive.adaptive_attention import AdaptivePlan, adaptive_attention
from mindspeed.core.context_parallel.exchange import Exchange, Mailbox
from mindspeed.core.context_parallel.gathered_attention import (
    GatheredPlan,
    HeadMove,
    Move,
    SequenceMove,
    gathered_attention,
    heads_first,
    sequence_first,
)
from mindspeed.core.context_parallel.groups import ContextGroups, check_alike
from mindspeed.core.context_parallel.layout import SequenceLayout, positions_of
from mindspeed.core.context_parallel.placement import Segments
from mindspeed.core.context_parallel.plan import GATHER, ContextPlan
from mindspeed.core.context_parallel.ring_attention import RingContext, ring_attention
from mindspeed.core.context_parallel.ulysses import heads_to_sequence, repeats_needed, sequence_to_heads
from mindspeed.core.context_parallel.work import AttentionOptions, plan_between, plan_tile, plan_work

CACHED_ULYSSES = {"full": "local", "half": "half"}


@dataclass(frozen=True)
class Stay:
    """Keys and values are where they are needed already: one device."""

    def gather(self, local: Tensor) -> Tensor:
        """Unchanged."""
        return local

    def reduce(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """Its dtype alone changes."""
        return gradient.to(dtype)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: ContextPlan,
    groups: ContextGroups,
    layout: SequenceLayout,
    options: AttentionOptions,
    layer_number: int = 1,
) -> Tensor:
    """Attention over a sequence that is shared out as `plan` says; differentiable.

    Args:
        q: [s, b, n, d]; k: [s, b, g, d]; v: [s, b, g, dv]: this rank's tokens, in the order of the layout.
        layout: of this micro batch, with the mask of this layer.
        options: scale, dropout and ALiBi slopes [n] of this tensor-parallel rank's heads.
        layer_number: 1-based, over the whole model; decides about caching.

    Returns:
        [s, b, n, dv] in q's dtype.
    """
    if plan.size == 1:
        return gathered_attention(q, k, v, GatheredPlan(Stay(), plan_work(layout, 0, 0, q.shape[1], options)))
    assert groups.cp is not None, "context-parallel groups do not exist yet"
    check_alike(groups.cp, q=q, k=k, v=v)
    policy = plan.cache if plan.caches(layer_number) else None
    if plan.algorithm == GATHER:
        return _with_gathered_sequence(q, k, v, groups, layout, options)
    if layout.rounds is not None:
        return _with_some_heads(_adaptive(plan, groups, layout), q, k, v, groups.get("cp_ulysses"), options)
    if plan.ring > 1:
        return _with_some_heads(_ring(plan, groups, layout, policy), q, k, v, groups.get("cp_ulysses"), options)
    if policy is None and not plan.allgather_kv:
        return _with_some_heads(_gathered(layout), q, k, v, groups.cp, options)
    return _with_gathered_heads(q, k, v, plan, groups.cp, layout, options, policy)


Attention = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]  # of some heads: [s, b, n, d] -> [s, b, n, dv]


def _ring(plan: ContextPlan, groups: ContextGroups, layout: SequenceLayout, policy: str | None) -> Attention:
    """Keys and values travel round `cp_ring`."""
    ring, inner = groups.get("cp_ring"), groups.get("cp_ring_intra")
    assert ring is not None

    def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        context = RingContext(
            Exchange(ring, groups.get("cp2")),
            dist.get_rank(ring),
            layout,
            replace(options, memory_order=plan.memory_order),
            inner=None if inner is None else Exchange(inner, groups.get("cp_ring_intra_overlap"), addresses=ring),
            window=plan.window,
            cache=policy or "none",
            fused_update=plan.fused_update,
            gradient_dtype=plan.gradient_dtype,
        )
        return _heads_first_in(ring_attention, q, k, v, context)

    return attention


def _adaptive(plan: ContextPlan, groups: ContextGroups, layout: SequenceLayout) -> Attention:
    """Tiles are computed over `cp_ring` by the layout's schedule."""
    ring, rounds = groups.get("cp_ring"), layout.rounds
    assert ring is not None and rounds is not None

    def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        batch = q.shape[1]
        steps = AdaptivePlan(
            rounds,
            dist.get_rank(ring),
            plan.ring,
            Mailbox(ring),
            lambda task: plan_tile(layout, task.row, task.column, batch, options),
            plan.gradient_dtype,
        )
        return _heads_first_in(adaptive_attention, q, k, v, steps)

    return attention


def _heads_first_in(
    function: Callable[[Tensor, Tensor, Tensor, Any], Tensor], q: Tensor, k: Tensor, v: Tensor, how: Any
) -> Tensor:
    """Call a function of [b, heads, s, d] with [s, b, heads, d]; views only."""
    return sequence_first(function(heads_first(q), heads_first(k), heads_first(v), how))


def _gathered(layout: SequenceLayout, move: Move = Stay(), keep: str = "gathered") -> Attention:
    """The whole sequence is here, or `move` brings keys and values."""

    def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        return gathered_attention(q, k, v, GatheredPlan(move, plan_work(layout, 0, 0, q.shape[1], options), keep))

    return attention


def _with_gathered_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan,
    group: ProcessGroup,
    layout: SequenceLayout,
    options: AttentionOptions,
    policy: str | None,
) -> Tensor:
    """Ulysses whose keys and values are brought inside attention: by exchange or all-gather, and again in backward."""
    move = SequenceMove(group) if plan.allgather_kv else HeadMove(group, k.shape[2])
    attention = _gathered(layout, move, "gathered" if policy is None else CACHED_ULYSSES[policy])
    (query,) = sequence_to_heads((q,), group)
    return heads_to_sequence(attention(query, k, v, _own_heads(options, q.shape[2], group)), group)


def _with_gathered_sequence(
    q: Tensor, k: Tensor, v: Tensor, groups: ContextGroups, layout: SequenceLayout, options: AttentionOptions
) -> Tensor:
    """Queries stay, keys and values of all ranks are gathered (arXiv 2407.21783, section 3.3.2)."""
    group = groups.cp
    assert group is not None
    rank, batch = dist.get_rank(group), q.shape[1]
    order = torch.cat([positions_of(layout.segments(other)) for other in range(layout.ranks)]).argsort().to(q.device)
    work = plan_between(layout, lambda sample: layout.segments(rank, sample), lambda sample: _chunks(layout), batch, options)
    return gathered_attention(q, k, v, GatheredPlan(SequenceMove(group, order), work, "local"))


def _chunks(layout: SequenceLayout) -> Segments:
    """Segments of all ranks in the order of positions, so that what is wholly visible is planned as such."""
    return tuple(sorted(segment for rank in range(layout.ranks) for segment in layout.segments(rank)))


def _with_some_heads(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: ProcessGroup | None,
    options: AttentionOptions,
) -> Tensor:
    """Attention inside an exchange of heads against sequence over the ranks of a group; without one, attention as it is."""
    if group is None:
        return attention(q, k, v, options)
    repeats = repeats_needed(k.shape[2], dist.get_world_size(group))
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    inside = sequence_to_heads((q, k, v), group)
    return heads_to_sequence(attention(*inside, _own_heads(options, q.shape[2], group)), group)


def _own_heads(options: AttentionOptions, heads: int, group: ProcessGroup) -> AttentionOptions:
    """Options for the heads that a Ulysses rank computes: its ALiBi slopes, and its part of the dropout mask."""
    share = heads // dist.get_world_size(group)
    first = dist.get_rank(group) * share
    if options.slopes is not None:
        options = replace(options, slopes=options.slopes[first : first + share])
    if options.dropout is not None:
        options = replace(options, dropout=options.dropout.of_heads(first))
    return options
