"""Where the tokens of a sequence live: which global positions each rank of a ring holds, in which order.

A placement is a function from ring rank to segments, contiguous ranges of global positions in local order.
Every rank holds the same number of tokens, and together the segments are all positions exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Segment(NamedTuple):
    """Global positions `start` to `stop - 1`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.stop - self.start


Segments = tuple[Segment, ...]


def contiguous(length: int, ranks: int) -> tuple[Segments, ...]:
    """One block a rank, in order; for Ulysses and for arbitrary masks.

    Raises:
        ValueError: `length` does not divide by `ranks`.
    """
    _must_divide(length, ranks)
    size = length // ranks
    return tuple((Segment(rank * size, (rank + 1) * size),) for rank in range(ranks))


def zigzag(length: int, ranks: int) -> tuple[Segments, ...]:
    """Chunks r and 2R - 1 - r of 2R: every rank owns equally many entries of the causal triangle.

    Raises:
        ValueError: `length` does not divide by 2 x `ranks`.
    """
    if ranks == 1:
        return ((Segment(0, length),),)
    _must_divide(length, 2 * ranks)
    size = length // (2 * ranks)
    chunks = [Segment(index * size, (index + 1) * size) for index in range(2 * ranks)]
    return tuple((chunks[rank], chunks[2 * ranks - 1 - rank]) for rank in range(ranks))


def document_zigzag(boundaries: Sequence[int], ranks: int) -> tuple[Segments, ...]:
    """Each document in zigzag over the ranks, for documents of any length, balanced to one token a document.

    Every document is cut into 2R chunks whose sizes differ by at most one; where a longer chunk goes is decided
    by who still has to take most tokens, so that all ranks end with the same number.

    Args:
        boundaries: 0, the end of each document, the last being the sequence length.

    Raises:
        ValueError: the length does not divide by 2 x `ranks`.
    """
    length = boundaries[-1]
    if ranks == 1:
        return ((Segment(0, length),),)
    _must_divide(length, 2 * ranks)
    chunks = 2 * ranks
    spare = [length // ranks - sum(2 * ((stop - start) // chunks) for start, stop in pairwise(boundaries))] * ranks
    held: list[list[Segment]] = [[] for _ in range(ranks)]
    for start, stop in pairwise(boundaries):
        longer = _longer_chunks((stop - start) % chunks, spare)
        owner = [min(chunk, chunks - 1 - chunk) for chunk in range(chunks)]
        position = start
        for chunk in range(chunks):
            size = (stop - start) // chunks + (chunk in longer)
            if size:
                held[owner[chunk]].append(Segment(position, position + size))
            position += size
    return tuple(_joined(segments) for segments in held)


def _longer_chunks(extra: int, spare: list[int]) -> set[int]:
    """Which chunks of a document hold one token more; `spare`, tokens each rank must still take, is reduced."""
    ranks, longer = len(spare), set()
    taken = [0] * ranks
    for _ in range(extra):
        rank = max((rank for rank in range(ranks) if taken[rank] < 2), key=lambda rank: (spare[rank], -rank))
        longer.add(rank if taken[rank] == 0 else 2 * ranks - 1 - rank)
        taken[rank] += 1
        spare[rank] -= 1
    return longer


def _joined(segments: Sequence[Segment]) -> Segments:
    """Join segments that follow each other without a gap."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].stop == segment.start:
            joined[-1] = Segment(joined[-1].start, segment.stop)
        else:
            joined.append(segment)
    return tuple(joined)


def piece(segments: Segments, index: int, pieces: int) -> Segments:
    """The `index`-th of `pieces` equal, contiguous parts of a block's local order (the Ulysses split of a ring block).

    Raises:
        ValueError: the block does not divide.
    """
    total = sum(segment.size for segment in segments)
    _must_divide(total, pieces)
    first, last = index * total // pieces, (index + 1) * total // pieces
    found, offset = [], 0
    for segment in segments:
        low, high = max(first, offset), min(last, offset + segment.size)
        if low < high:
            found.append(Segment(segment.start + low - offset, segment.start + high - offset))
        offset += segment.size
    return tuple(found)


def _must_divide(length: int, parts: int) -> None:
    if length % parts:
        raise ValueError(f"a sequence of {length} tokens does not divide into {parts} equal parts")
