"""What is added to attention scores and which of them are excluded, as functions of query and key position."""

# B batch, N query heads, Sq / Sk query and key positions of one segment, R a slice of query positions

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed.ops._transfer import to_device

LIMIT = 2147483647
COMPRESSED_ROWS = 1024
"""Rows of a compressed position bias: it holds the last rows, and the rows above repeat its diagonals."""


class Options(NamedTuple):
    """The arguments of `fusion_attention` after query, key and value, in the order of the schema."""

    head_num: int
    layout: str
    pse: Tensor | None
    atten_mask: Tensor | None
    scale: float
    keep_prob: float
    pre_tokens: int
    next_tokens: int
    inner_precise: int
    prefix: list[int] | None
    actual_seq_qlen: list[int] | None
    actual_seq_kvlen: list[int] | None
    sparse_mode: int
    pse_type: int
    q_start_idx: list[int] | None
    kv_start_idx: list[int] | None
    rng: Tensor | None


@dataclass(frozen=True)
class Segment:
    """Queries and keys that see each other: the whole batch, or one sequence of a TND batch."""

    queries: slice
    keys: slice
    first: bool  # of the non-empty sequences
    last: bool
    sequence: int | None = None  # place in a TND batch: which entry of what is given per sequence is its own

    def own(self, values: Tensor) -> Tensor:
        """The entries [1, ...] of this segment in [B or 1, ...]; all of them where the segment is the whole batch."""
        if self.sequence is None or values.shape[0] == 1:
            return values
        return values[self.sequence : self.sequence + 1]


def segments(queries: int, keys: int, options: Options) -> Iterator[Segment]:
    """The segments of a call, empty sequences left out; `queries` and `keys` are the sizes of the sequence dimension."""
    if options.layout != "TND":
        yield Segment(slice(0, queries), slice(0, keys), True, True)
        return
    q_ends, k_ends = (strip(ends) for ends in (options.actual_seq_qlen, options.actual_seq_kvlen))
    bounds = list(zip([0, *q_ends[:-1]], q_ends, [0, *k_ends[:-1]], k_ends, strict=False))
    filled = [index for index, (start, end, _, _) in enumerate(bounds) if end > start]
    for index in filled:
        q_start, q_end, k_start, k_end = bounds[index]
        yield Segment(slice(q_start, q_end), slice(k_start, k_end), index == filled[0], index == filled[-1], index)


def strip(ends: list[int]) -> list[int]:
    """Cumulative ends without the trailing zeros that stand for unused batches."""
    ends = list(ends)
    while ends and ends[-1] == 0:
        ends.pop()
    return ends


def segment_mode(options: Options, segment: Segment) -> int:
    """The sparse mode of one segment: 7 and 8 are mode 4 in one sequence and mode 3 or 2 in the others."""
    if options.sparse_mode == 7:
        return 4 if segment.last else 3
    if options.sparse_mode == 8:
        return 4 if segment.first else 2
    return options.sparse_mode


def band(options: Options, segment: Segment, queries: int, keys: int) -> tuple[int | None, int | None]:
    """`(lowest, highest)` allowed j - i of a segment from its mode alone; None is no bound. Nothing is bound without a mask."""
    if options.atten_mask is None:
        return None, None
    mode, shift = segment_mode(options, segment), keys - queries
    if mode == 0:
        low = None if options.pre_tokens >= LIMIT else -options.pre_tokens
        return low, None if options.next_tokens >= LIMIT else options.next_tokens
    if mode == 4:
        return shift - options.pre_tokens, shift + options.next_tokens
    return None, {2: 0, 3: shift}.get(mode)


def excluded(options: Options, segment: Segment, rows: slice, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Boolean mask broadcastable to [B, N, R, Sk], True = excluded, for a slice of query positions; None if all may be seen."""
    low, high = band(options, segment, queries, keys)
    parts = []
    if low is not None or high is not None:
        distance = torch.arange(keys, device=device) - torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
        if high is not None:
            parts.append(distance > high)
        if low is not None:
            parts.append(distance < low)
    mode = segment_mode(options, segment)
    if options.atten_mask is not None and mode in (0, 1):
        mask = options.atten_mask if options.atten_mask.dim() == 2 else segment.own(options.atten_mask)
        mask = mask.to(torch.bool)
        parts.append(mask[..., rows, :keys])
    if options.atten_mask is not None and mode in (5, 6):
        position = torch.arange(keys, device=device)
        causal = position - torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) > keys - queries
        beyond = position >= segment.own(to_device(options.prefix, device)).unsqueeze(1)
        parts.append(causal & beyond[:, None, None, :])
    found = None
    for part in parts:
        found = part if found is None else found | part
    return found


def bias(options: Options, segment: Segment, rows: slice, queries: int, keys: int) -> Tensor | None:
    """What is added to `q @ k` (type 1, before scaling) or to the scaled scores (others), broadcastable to [B, N, R, Sk]."""
    pse = options.pse
    if pse is None:
        return None
    if options.pse_type in (2, 3):
        starts = (0, 0)
        if options.sparse_mode != 8 or segment.first:
            starts = tuple(values[0] if values else 0 for values in (options.q_start_idx, options.kv_start_idx))
        i = torch.arange(rows.start, rows.stop, device=pse.device).unsqueeze(1) + starts[0]
        distance = (torch.arange(keys, device=pse.device) + starts[1] - i).abs().to(torch.float32)
        distance = distance.sqrt() if options.pse_type == 3 else distance
        slopes = segment.own(pse) if pse.dim() == 2 else pse.unsqueeze(0)
        return -slopes[:, :, None, None] * distance
    pse = segment.own(pse)
    if pse.shape[2] == 1:
        return pse[..., :keys]
    if compressed(pse, queries):
        row, column = compressed_index(rows, queries, keys, pse.device)
        return pse[:, :, row, column]
    return pse[..., rows, :keys]


def compressed(pse: Tensor, queries: int) -> bool:
    """Whether a position bias holds the last 1024 of more query rows."""
    return pse.shape[2] == COMPRESSED_ROWS and queries > COMPRESSED_ROWS


def compressed_index(rows: slice, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of a compressed position bias for each (i, j): its own row, or the same diagonal in the first row."""
    own = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) - (queries - COMPRESSED_ROWS)
    row = own.clamp(min=0)
    column = (torch.arange(keys, device=device) + (row - own)).clamp(max=keys - 1)
    return row.expand(column.shape), column
