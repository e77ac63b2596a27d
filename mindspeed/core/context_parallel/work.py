"""Kernel calls between two blocks of a sequence: tiles with their mask, bias and dropout filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from mindspeed.core.attention import FULL, Accumulator, Dropout, GradientSum, Scoring, attend, attend_backward
from mindspeed.core.attention.bias import AlibiBias, MaskBias, SumOfBiases
from mindspeed.core.attention.contract import Bias, Visibility
from mindspeed.core.context_parallel.layout import SequenceLayout, positions_of, tiles_between
from mindspeed.core.context_parallel.placement import Segments


@dataclass(frozen=True)
class AttentionOptions:
    """What all tiles of one attention call share.

    Attributes:
        scale: factor of the scores.
        dropout: probability, seed and first head; tiles tell it where they lie, so that the mask does not depend on which
            rank computes them.
        slopes: ALiBi slopes [N] fp32 of this rank's heads, or None.
        distance: what the slopes multiply: "absolute", "root" (of the absolute one) or "signed".
        memory_order: what kernels that read several arrangements are handed, see `Scoring`.
    """

    scale: float
    dropout: Dropout | None = None
    slopes: Tensor | None = None
    distance: str = "absolute"
    memory_order: str = "SBH"

    def scoring(self, visible: Visibility = FULL, bias: Bias | None = None) -> Scoring:
        """Scoring of one tile."""
        return Scoring(self.scale, visible, bias, self.dropout, self.memory_order)


@dataclass(frozen=True)
class Work:
    """One kernel call on local slices of samples, queries and keys."""

    samples: slice
    rows: slice
    keys: slice
    scoring: Scoring


SegmentsOf = Callable[[int], Segments]  # sample -> segments of a block in local order


def plan_work(
    layout: SequenceLayout, query_rank: int, key_rank: int, batch: int, options: AttentionOptions
) -> tuple[Work, ...]:
    """Kernel calls between the blocks of two ring ranks; empty when nothing is visible."""
    if layout.tile_masks is not None and layout.custom_mask is None:
        rows, keys = positions_of(layout.block(query_rank)), positions_of(layout.block(key_rank))
        return _tile_work(layout.tile_masks[query_rank, key_rank], rows, keys, batch, options)
    return plan_between(
        layout, lambda sample: layout.block(query_rank, sample), lambda sample: layout.block(key_rank, sample), batch, options
    )


def plan_between(
    layout: SequenceLayout, queries: SegmentsOf, keys: SegmentsOf, batch: int, options: AttentionOptions
) -> tuple[Work, ...]:
    """Kernel calls between any two blocks."""
    if layout.custom_mask is not None:
        rows, columns = queries(0), keys(0)
        parts = layout.remembered(
            (rows, columns), lambda: _parts_of_mask(layout.custom_mask, positions_of(rows), positions_of(columns))
        )
        return tuple(_custom_work(parts, positions_of(rows), positions_of(columns), batch, options))
    groups = [slice(index, index + 1) for index in range(batch)] if layout.samples_differ else [slice(0, batch)]
    found = []
    for samples in groups:
        rows, columns = queries(samples.start), keys(samples.start)
        for tile in tiles_between(rows, columns, layout.rule(samples.start), options.slopes is None):
            work = Work(samples, tile.rows, tile.keys, options.scoring(tile.visible))
            if options.slopes is not None or options.dropout is not None:
                work = _with_places(work, positions_of(rows)[tile.rows], positions_of(columns)[tile.keys], options)
            found.append(work)
    return tuple(found)


def _with_places(work: Work, rows: Tensor, keys: Tensor, options: AttentionOptions) -> Work:
    """A tile that knows where its queries and keys are in the sequence: ALiBi and dropout depend on it."""
    scoring = work.scoring
    if options.slopes is not None:
        alibi = AlibiBias(options.slopes, rows, keys, options.distance)
        scoring = replace(scoring, bias=alibi if scoring.bias is None else SumOfBiases((alibi, scoring.bias)))
    if scoring.dropout is not None:
        scoring = replace(scoring, dropout=scoring.dropout.of_tile(rows, keys, work.samples.start))
    return replace(work, scoring=scoring)


def plan_tile(
    layout: SequenceLayout, query_rank: int, key_rank: int, batch: int, options: AttentionOptions
) -> tuple[Work, ...]:
    """Kernel calls of a tile of remapped tokens; the layout has an order, and a mask or masks of its tiles."""
    assert layout.order is not None and layout.custom_mask is not None
    rows, keys = (layout.order.view(layout.ring, -1)[rank] for rank in (query_rank, key_rank))
    if layout.tile_masks is not None:
        return _tile_work(layout.tile_masks[query_rank, key_rank], rows, keys, batch, options)
    parts = layout.remembered((query_rank, key_rank), lambda: _parts_of_mask(layout.custom_mask, rows, keys))
    return tuple(_custom_work(parts, rows, keys, batch, options))


def _tile_work(hidden: Tensor | None, rows: Tensor, keys: Tensor, batch: int, options: AttentionOptions) -> tuple[Work, ...]:
    """The kernel call of a tile whose mask is given, None where all is visible."""
    return tuple(_custom_work([("whole" if hidden is None else "part", hidden)], rows, keys, batch, options))


MaskParts = list[tuple[str, Tensor | None]]  # for each mask: what of it is visible, and the part [rows, keys] if some is


def _parts_of_mask(mask: Tensor, rows: Tensor, keys: Tensor) -> MaskParts:
    """A mask's entries at these positions; looked at once, for all layers."""
    found: MaskParts = []
    for hidden in mask.reshape(-1, *mask.shape[-2:]):
        part = hidden.index_select(0, rows.to(mask.device)).index_select(1, keys.to(mask.device))
        if part.all():
            found.append(("nothing", None))
        else:
            found.append(("part", part) if part.any() else ("whole", None))
    return found


def _custom_work(parts: MaskParts, rows: Tensor, keys: Tensor, batch: int, options: AttentionOptions) -> Iterator[Work]:
    """At most one call per mask: none where all is hidden, mask-free where all is visible."""
    for index, (visible, part) in enumerate(parts):
        if visible == "nothing":
            continue
        samples = slice(0, batch) if len(parts) == 1 else slice(index, index + 1)
        bias = None if part is None else MaskBias(part)
        work = Work(samples, slice(0, len(rows)), slice(0, len(keys)), options.scoring(bias=bias))
        yield _with_places(work, rows, keys, options)


def forward_block(q: Tensor, k: Tensor, v: Tensor, work: tuple[Work, ...], total: Accumulator) -> list[object]:
    """Compute the tiles of one block pair and merge them; returns each tile's state for backward."""
    states = []
    for tile in work:
        out, lse, state = attend(
            q[tile.samples, :, tile.rows], k[tile.samples, :, tile.keys], v[tile.samples, :, tile.keys], tile.scoring
        )
        total.add(out, lse, tile.rows, tile.samples)
        states.append(state)
    return states


def backward_block(
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    work: tuple[Work, ...],
    states: list[object],
    dq: GradientSum,
) -> tuple[GradientSum, GradientSum]:
    """Gradients of one block pair: adds to `dq`, returns those of the block's keys and values.

    Args:
        saved: grad_out, q, out, lse of the queries of this rank.
    """
    grad_out, q, out, lse = saved
    dk, dv = GradientSum(k), GradientSum(v)
    for tile, state in zip(work, states, strict=True):
        rows, keys = (tile.samples, slice(None), tile.rows), (tile.samples, slice(None), tile.keys)
        parts = attend_backward(grad_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], tile.scoring, state)
        for total, part, place in zip((dq, dk, dv), parts, (rows, keys, keys), strict=True):
            total.add(part, place)
    return dk, dv
