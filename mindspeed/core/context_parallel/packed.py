"""Packed batches of other programs: sequences one behind the other in one row, with their ends and, if padded, their places.

The convention under context parallelism is that of the host: each (padded) sequence is cut into 2R equal chunks, of which
ring rank r holds the chunks r and 2R - 1 - r. Ulysses ranks share the tokens of their ring block in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.maker import LayoutMaker


def packed_layout(maker: LayoutMaker, length: int, ends: Sequence[int], padded: Sequence[int] | None = None) -> SequenceLayout:
    """Layout of packed sequences; padding behind a sequence counts as a document of its own, so nothing sees it.

    Args:
        length: tokens of the row, padding included.
        ends: 0 and the cumulative lengths of the sequences.
        padded: 0 and the cumulative lengths with padding; equal to `ends` when absent.

    Raises:
        ValueError: the numbers do not fit together, or a sequence cannot be cut into equal chunks.
    """
    places = list(ends) if padded is None else list(padded)
    _check(ends, places, length, 2 * maker.plan.ring if maker.plan.ring > 1 else 1)
    inner = {place + stop - start for place, (start, stop) in zip(places, pairwise(ends), strict=False)}
    boundaries = tuple(sorted({0, length, *places, *inner}))
    layout = maker.layout(length, boundaries=(boundaries,))
    placement = "document_zigzag" if maker.plan.ring > 1 else "contiguous"
    return replace(layout, placement=placement, cuts=(tuple(sorted(set(places))),))


def _check(ends: Sequence[int], places: Sequence[int], length: int, unit: int) -> None:
    name = "packed_seq_params"
    if len(ends) != len(places):
        raise ValueError(f"{name}: {len(ends)} entries of cu_seqlens and {len(places)} of the padded ones")
    if (
        ends[0] != 0
        or places[0] != 0
        or any(stop < start for cumulative in (ends, places) for start, stop in pairwise(cumulative))
    ):
        raise ValueError(f"{name}: cu_seqlens must start at 0 and not fall, got {list(ends)} and padded {list(places)}")
    if places[-1] != length:
        raise ValueError(f"{name}: sequences end at {places[-1]}, but the batch has {length} tokens")
    for (start, stop), (low, high) in zip(pairwise(ends), pairwise(places), strict=True):
        if stop - start > high - low:
            raise ValueError(f"{name}: a sequence of {stop - start} tokens does not fit its padded length {high - low}")
        if (high - low) % unit:
            raise ValueError(
                f"{name}: a sequence of {high - low} tokens must be padded to a multiple of {unit} (2 x ring size)"
            )


def positions_in_sequences(layout: SequenceLayout, rank: int, places: Sequence[int]) -> Tensor:
    """Position of each of a rank's tokens in its own sequence, int64 [tokens]."""
    index = layout.index(rank).reshape(-1)
    starts = torch.tensor(list(places))
    return index - starts[torch.bucketize(index, starts[1:], right=True)]
