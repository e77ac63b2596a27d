"""Cut attention between two blocks of a sequence into kernel calls that visit little more than what is visible.

Pure arithmetic on positions: no tensors, no devices. The same plan serves every rank, device and direction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mindspeed.core.attention.contract import CAUSAL, FULL, Visibility
from mindspeed.core.context_parallel.placement import Segment, Segments


@dataclass(frozen=True)
class Rule:
    """Which keys a query may see: key j of row i iff i - past <= j <= i + future, inside the same document.

    Attributes:
        past, future: None is no limit; a causal model has future 0.
        boundaries: 0, end of each document, ..., S; None is one document.
    """

    past: int | None = None
    future: int | None = 0
    boundaries: tuple[int, ...] | None = None

    @property
    def is_plain_causal(self) -> bool:
        """Whether only the order of positions matters."""
        return self.past is None and self.future == 0 and self.boundaries is None


@dataclass(frozen=True)
class Tile:
    """One kernel call: local rows of the query block, local keys of the key block, what is visible between them."""

    rows: slice
    keys: slice
    visible: Visibility

    @property
    def area(self) -> int:
        """Scores that a kernel visits when it skips nothing."""
        return (self.rows.stop - self.rows.start) * (self.keys.stop - self.keys.start)


def plan_tiles(queries: Segments, keys: Segments, rule: Rule, *, join: bool = True) -> tuple[Tile, ...]:
    """Tiles that cover each visible (query, key) pair of two blocks exactly once, and skip blocks that see nothing.

    Args:
        queries, keys: segments of the two blocks in local order.
        join: merge tiles into fewer, larger calls; off where a kernel needs tiles of contiguous positions.
    """
    if join and rule.is_plain_causal and queries == keys and _is_rising(queries):
        size = sum(segment.size for segment in queries)
        return (Tile(slice(0, size), slice(0, size), CAUSAL),)
    tiles = [
        tile
        for query, row_offset in _with_offsets(queries)
        for key, key_offset in _with_offsets(keys)
        for tile in _tiles_of_pair(query, key, row_offset, key_offset, rule)
    ]
    return tuple(_join_full(tiles)) if join else tuple(tiles)


def _is_rising(segments: Segments) -> bool:
    return all(first.stop <= second.start for first, second in zip(segments, segments[1:], strict=False))


def _with_offsets(segments: Segments) -> Iterator[tuple[Segment, int]]:
    """Segments with their place in local order."""
    offset = 0
    for segment in segments:
        yield segment, offset
        offset += segment.size


def _tiles_of_pair(query: Segment, key: Segment, row_offset: int, key_offset: int, rule: Rule) -> Iterator[Tile]:
    """Tiles between two contiguous ranges: one per document that reaches into both."""
    for document in _documents_in_both(query, key, rule.boundaries):
        rows = Segment(max(query.start, document.start), min(query.stop, document.stop))
        columns = Segment(max(key.start, document.start), min(key.stop, document.stop))
        trimmed = _trim(rows, columns, rule)
        if trimmed is not None:
            rows, columns = trimmed
            yield Tile(
                slice(rows.start - query.start + row_offset, rows.stop - query.start + row_offset),
                slice(columns.start - key.start + key_offset, columns.stop - key.start + key_offset),
                _visibility(rows, columns, rule),
            )


def _documents_in_both(query: Segment, key: Segment, boundaries: Sequence[int] | None) -> Iterator[Segment]:
    """Documents that have tokens in both ranges; looks only at those near them."""
    if boundaries is None:
        yield Segment(min(query.start, key.start), max(query.stop, key.stop))
        return
    first = bisect_right(boundaries, max(query.start, key.start)) - 1
    for start, stop in zip(boundaries[first:], boundaries[first + 1 :], strict=False):
        if start >= min(query.stop, key.stop):
            return
        yield Segment(start, stop)


def _trim(rows: Segment, keys: Segment, rule: Rule) -> tuple[Segment, Segment] | None:
    """Drop rows that see no key and keys that no row sees; None when nothing is left."""
    low, high = rows.start, rows.stop
    if rule.future is not None:
        low = max(low, keys.start - rule.future)
    if rule.past is not None:
        high = min(high, keys.stop + rule.past)
    if low >= high:
        return None
    first, last = keys.start, keys.stop
    if rule.past is not None:
        first = max(first, low - rule.past)
    if rule.future is not None:
        last = min(last, high + rule.future)
    return (Segment(low, high), Segment(first, last)) if first < last else None


def _visibility(rows: Segment, keys: Segment, rule: Rule) -> Visibility:
    """Limits that still cut into this rectangle."""
    past = rule.past if rule.past is not None and keys.start < rows.stop - 1 - rule.past else None
    future = rule.future if rule.future is not None and keys.stop - 1 > rows.start + rule.future else None
    return FULL if past is None and future is None else Visibility(past, future, keys.start - rows.start)


def _join_full(tiles: list[Tile]) -> list[Tile]:
    """Merge mask-free tiles that share rows or keys and touch along the other side."""
    merged = True
    while merged:
        merged = False
        for index, first in enumerate(tiles):
            partner = next((other for other in tiles[index + 1 :] if _joined(first, other)), None)
            if partner is not None:
                tiles = [tile for tile in tiles if tile is not partner]
                tiles[index] = _joined(first, partner) or first
                merged = True
                break
    return tiles


def _joined(first: Tile, second: Tile) -> Tile | None:
    """The union of two mask-free tiles when it is a rectangle."""
    if not (first.visible.is_full and second.visible.is_full):
        return None
    if first.rows == second.rows and first.keys.stop == second.keys.start:
        return replace(first, keys=slice(first.keys.start, second.keys.stop))
    if first.keys == second.keys and first.rows.stop == second.rows.start:
        return replace(first, rows=slice(first.rows.start, second.rows.stop))
    return None


def visible_entries(tiles: Sequence[Tile]) -> int:
    """Number of (query, key) pairs that the tiles let through, for work balance and tests."""
    return sum(_entries(tile) for tile in tiles)


def _entries(tile: Tile) -> int:
    """Visible pairs of one tile, row by row."""
    num_keys = tile.keys.stop - tile.keys.start
    if tile.visible.is_full:
        return tile.area
    return sum(len(tile.visible.key_range(range(row, row + 1), num_keys)) for row in range(tile.rows.stop - tile.rows.start))
