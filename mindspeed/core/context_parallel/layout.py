"""One immutable object that says where tokens live and what may see what; everything sequence-like follows it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.context_parallel.documents import restarted_positions
from mindspeed.core.context_parallel.placement import Segment, Segments, contiguous, document_zigzag, piece, zigzag
from mindspeed.core.context_parallel.tiles import Rule, Tile, plan_tiles

Boundaries = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SequenceLayout:
    """Distribution of a sequence of `length` tokens over `ring` x `ulysses` ranks.

    Rank c = ring_rank x ulysses + ulysses_rank. The ring splits the sequence, Ulysses splits each ring block further
    outside attention and the heads inside it. `ring` = 1 is plain Ulysses, `ulysses` = 1 a plain ring.

    Attributes:
        length: global tokens S of a sample.
        placement: "contiguous", "zigzag" or "document_zigzag".
        past, future: limits of the mask, None for none (see `Rule`).
        boundaries: per sample 0, ends of documents, S; None when documents do not matter.
        restart_positions: positions count from 0 in each document.
        cuts: where per-document placement cuts, when that is not at the ends of documents (padded packs).
        sizes: tokens of each ring rank, when blocks are contiguous and unequal.
        order: positions [S] in the order of devices, when tokens are remapped; then there are no segments.
        rounds: schedule of tiles that belongs to the order.
        planned_by_rule: order, rounds and mask come from `past` and `future`; nobody set a mask.
        tile_masks: (row, column) -> bool [s, s] of this rank's tiles, True where hidden, None where all is visible; when
            the user gives these instead of a whole mask.
        custom_mask: boolean [S, S] or [1 or B, 1, S, S], True where hidden; replaces all other rules.
    """

    length: int
    ring: int = 1
    ulysses: int = 1
    placement: str = "zigzag"
    past: int | None = None
    future: int | None = 0
    boundaries: Boundaries | None = None
    restart_positions: bool = False
    cuts: Boundaries | None = None
    sizes: tuple[int, ...] | None = None
    rounds: tuple[Any, ...] | None = None
    planned_by_rule: bool = False
    order: Tensor | None = field(default=None, compare=False)
    tile_masks: Mapping[tuple[int, int], Tensor | None] | None = field(default=None, compare=False)
    custom_mask: Tensor | None = field(default=None, compare=False)
    _parts: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key the first time: parts of the mask serve every layer of a micro batch."""
        if key not in self._parts:
            self._parts[key] = make()
        return self._parts[key]

    @property
    def ranks(self) -> int:
        """Context-parallel size."""
        return self.ring * self.ulysses

    def block(self, ring_rank: int, sample: int = 0) -> Segments:
        """Segments of a ring rank's block (what Ulysses ranks of it see after their exchange)."""
        if self.sizes is not None:
            start = sum(self.sizes[:ring_rank])
            return (Segment(start, start + self.sizes[ring_rank]),)
        return _blocks(self.placement, self.length, self.ring, self._boundaries_of(sample))[ring_rank]

    def segments(self, rank: int, sample: int = 0) -> Segments:
        """Segments of one rank's share."""
        return piece(self.block(rank // self.ulysses, sample), rank % self.ulysses, self.ulysses)

    def index(self, rank: int) -> Tensor:
        """Global positions of a rank in local order, int64: [S / cp], or [B, S / cp] when samples differ."""
        if self.order is not None:
            return self.order.view(self.ranks, -1)[rank]
        if self.placement != "document_zigzag" or self.boundaries is None:
            return positions_of(self.segments(rank))
        return torch.stack([positions_of(self.segments(rank, sample)) for sample in range(len(self.boundaries))])

    def position_ids(self, rank: int) -> Tensor:
        """Positions that embeddings use: as `index`, or restarted in each document, then [B, S / cp]."""
        if not self.restart_positions or self.boundaries is None:
            return self.index(rank)
        index = self.index(rank)
        rows = index if index.dim() == 2 else index.expand(len(self.boundaries), -1)
        restarted = torch.stack([restarted_positions(boundaries) for boundaries in self.boundaries])
        return restarted.gather(1, rows)

    def rule(self, sample: int = 0) -> Rule:
        """What a query of this sample may see."""
        return Rule(self.past, self.future, None if self.boundaries is None else self.boundaries[sample])

    def tiles(self, query_rank: int, key_rank: int, sample: int = 0, *, join: bool = True) -> tuple[Tile, ...]:
        """Kernel calls between the blocks of two ring ranks. Not for custom masks."""
        return tiles_between(self.block(query_rank, sample), self.block(key_rank, sample), self.rule(sample), join)

    @property
    def samples_differ(self) -> bool:
        """Whether tiles have to be planned per sample."""
        return self.boundaries is not None and len(set(self.boundaries)) > 1

    def _boundaries_of(self, sample: int) -> tuple[int, ...] | None:
        cuts = self.cuts or self.boundaries
        return None if self.placement != "document_zigzag" or cuts is None else cuts[sample]


@functools.lru_cache(maxsize=512)
def _blocks(placement: str, length: int, ring: int, boundaries: tuple[int, ...] | None) -> tuple[Segments, ...]:
    if placement == "document_zigzag" and boundaries is not None:
        return document_zigzag(boundaries, ring)
    makers: Mapping[str, Callable[[int, int], tuple[Segments, ...]]] = {"contiguous": contiguous, "zigzag": zigzag}
    return makers["zigzag" if placement == "document_zigzag" else placement](length, ring)


@functools.lru_cache(maxsize=4096)
def tiles_between(queries: Segments, keys: Segments, rule: Rule, join: bool) -> tuple[Tile, ...]:
    """Plan of tiles, remembered: it is the same for every layer and most micro batches."""
    return plan_tiles(queries, keys, rule, join=join)


def positions_of(segments: Segments) -> Tensor:
    """Global positions [tokens], int64, of segments in order."""
    return torch.cat([torch.arange(segment.start, segment.stop, device="cpu") for segment in segments])


def take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of `tensor` along `dim` at positions [s], or per sample [B, s] (dim 1, batch first)."""
    index = index.to(tensor.device)
    if index.dim() == 1:
        return tensor.index_select(dim, index)
    if dim != 1 or tensor.shape[0] not in (1, index.shape[0]):
        raise ValueError(f"per-sample positions {tuple(index.shape)} need a batch-first tensor, got {tuple(tensor.shape)}")
    rows = index.reshape(*index.shape, *[1] * (tensor.dim() - 2)).expand(*index.shape, *tensor.shape[2:])
    return tensor.expand(index.shape[0], *tensor.shape[1:]).gather(1, rows)


def slice_batch(batch: Mapping[str, Any], layout: SequenceLayout, rank: int) -> dict[str, Any]:
    """This rank's share of a batch: tensors whose dim 1 is the sequence are cut, everything else is handed on.

    `attention_mask` becomes None: what may see what is part of the layout.
    """
    index = layout.index(rank)
    sliced: dict[str, Any] = {}
    for key, value in batch.items():
        if key == "attention_mask":
            sliced[key] = None
        elif isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == layout.length:
            sliced[key] = take(value, index, 1)
        else:
            sliced[key] = value
    if layout.restart_positions and isinstance(sliced.get("position_ids"), Tensor):
        sliced["position_ids"] = layout.position_ids(rank).to(sliced["position_ids"].device)
    return sliced
