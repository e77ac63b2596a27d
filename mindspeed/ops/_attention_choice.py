"""Which kernel serves a call of `fusion_attention` on CUDA: a function of dtypes, shapes, options and the device alone.

case                                                                    kernel
16 bits; nothing, a triangle or a band hidden                           flash: one call, or one per sequence of a TND batch
the same with equal bands in all sequences of a TND batch               flash-packed: one launch
forward in 16 bits; prefix or slopes over at least FLEX_SCORES scores   flex: compiled from the pattern, blocks left out
float32; a mask or a bias as a tensor; what is left of the above        efficient: the mask is built for some rows at a time
float64, the gradient of a bias, old devices                            reference: some rows of scores at a time
"""

# Sq / Sk query and key positions of one sequence

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed.ops._aten_attention import HALF, Window, fitting_window, flash_refuses
from mindspeed.ops._attention import key_heads, views
from mindspeed.ops._attention_scores import Options, Segment, band, segment_mode, segments

FLEX_SCORES = 1 << 22
"""Fewest scores of one head for which compiling a kernel for the pattern is worth its seconds."""

EFFICIENT_CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (7, 0), torch.float32: (7, 0)}
GRID = 65535  # samples, and heads, of one launch


@dataclass(frozen=True)
class Machine:
    """What the choice needs to know of a device."""

    capability: tuple[int, int]
    flex: bool  # whether kernels can be compiled for a pattern


class Tile(NamedTuple):
    """Queries and keys of one call of flash attention; keys that no query sees are left out."""

    queries: slice
    keys: slice
    window: Window


class Choice(NamedTuple):
    """A kernel with the reason for it; `tiles` are the calls of a flash kernel (one window for all if packed)."""

    kernel: str
    reason: str
    tiles: tuple[Tile, ...] = ()


def select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    machine: Machine,
    *,
    flex: bool = False,
    need_dpse: bool = False,
) -> Choice:
    """The kernel for this call; of the tensors only dtypes and shapes are read.

    Args:
        query, key, value, options: as in the schema of `fusion_attention`.
        machine: the device.
        flex: whether a compiled pattern may serve (forward only).
        need_dpse: whether the gradient of the bias is wanted.

    Each pattern is decided once: a call asks up to three times (who declines, and the body), and so does every layer.
    """
    tensors = tuple(
        None if t is None else (tuple(t.shape), t.dtype) for t in (query, key, value, options.pse, options.atten_mask)
    )
    plain = options._replace(pse=None, atten_mask=None, rng=None)
    rest = tuple(tuple(option) if isinstance(option, list) else option for option in plain)
    return _select(tensors, rest, machine, flex, need_dpse)


@functools.lru_cache(maxsize=256)
def _select(
    tensors: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...],
    rest: tuple[object, ...],
    machine: Machine,
    flex: bool,
    need_dpse: bool,
) -> Choice:
    """`select` from what it reads of the tensors (those of `select`, pse and mask) and the other options."""
    shaped = (None if t is None else torch.empty(t[0], dtype=t[1], device="meta") for t in tensors)
    query, key, value, pse, mask = shaped
    options = Options(*rest)._replace(pse=pse, atten_mask=mask)
    q, v = views(query, options, options.head_num), views(value, options, key_heads(query, key, options))
    if need_dpse:
        return Choice("reference", "the gradient of pse is wanted")
    if query.dtype not in EFFICIENT_CAPABILITY:
        return Choice("reference", f"fused attention has no {query.dtype}")
    if machine.capability < EFFICIENT_CAPABILITY[query.dtype]:
        needed = ".".join(map(str, EFFICIENT_CAPABILITY[query.dtype]))
        return Choice("reference", f"fused attention in {query.dtype} needs compute capability {needed}")
    if max(q.shape[:2]) > GRID:
        return Choice("reference", f"more than {GRID} samples or heads")
    tiles, refusal = _flash_tiles(q, v, options, machine, views(key, options, v.shape[1]).shape[2])
    if not refusal:
        kernel = "flash-packed" if _is_packable(tiles) else "flash"
        return Choice(kernel, "a window expresses what is hidden", tiles)
    if flex and not (declined := flex_refuses(query, key, value, options, machine)):
        return Choice("flex", f"{refusal}; a kernel is compiled for the pattern")
    return Choice("efficient", f"{refusal}; {declined}" if flex else refusal)


def _flash_tiles(q: Tensor, v: Tensor, options: Options, machine: Machine, keys: int) -> tuple[tuple[Tile, ...], str]:
    """The calls of flash attention, or why there are none."""
    refusal = flash_refuses(q.dtype, machine.capability, max(q.shape[-1], v.shape[-1]), options.keep_prob < 1.0)
    if refusal:
        return (), refusal
    if options.pse is not None:
        return (), "flash attention takes no bias"
    tiles = []
    for segment in segments(q.shape[2], keys, options):
        if options.atten_mask is not None and segment_mode(options, segment) not in (2, 3, 4):
            return (), f"flash attention takes no mask as in sparse mode {segment_mode(options, segment)}"
        for tile, refusal in _fitted(options, segment):
            if refusal:
                return (), refusal
            tiles.append(tile)
    return _with_common_window(tuple(tiles)), ""


def _fitted(options: Options, segment: Segment) -> Iterator[tuple[Tile, str]]:
    """The tile of one segment, or none where nothing is seen."""
    queries, keys = (span.stop - span.start for span in (segment.queries, segment.keys))
    low, high = band(options, segment, queries, keys)
    seen = keys if high is None else min(keys, queries + high)  # the last query sees at most key queries - 1 + high
    if seen <= 0:
        return
    # From the upper left corner to the lower right one, which lies where the keys that are seen end.
    window = None if low is None else seen - queries - low, None if high is None else high - (seen - queries)
    window, refusal = fitting_window(window, [(queries, seen)])
    yield Tile(segment.queries, slice(segment.keys.start, segment.keys.start + seen), window), refusal


def _with_common_window(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Tiles with the widest of their windows, if it means the same in each; else as they are."""
    if len(tiles) < 2:
        return tiles
    sizes = [(tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start) for tile in tiles]
    sides = ({tile.window[side] for tile in tiles} - {None} for side in (0, 1))
    window = tuple(max(side) if len(side) == 1 else None for side in sides)
    common, refusal = fitting_window(window, sizes)
    # A tile that dropped a side did so because it hides nothing there, so only the others must agree.
    kept = all(fitting_window(window, [size])[0] == tile.window for tile, size in zip(tiles, sizes, strict=True))
    return tuple(tile._replace(window=common) for tile in tiles) if kept and not refusal else tiles


def _is_packable(tiles: tuple[Tile, ...]) -> bool:
    """Whether one launch serves all: several sequences, side by side without a gap, under one window."""
    beside = all(
        a.queries.stop == b.queries.start and a.keys.stop == b.keys.start for a, b in zip(tiles, tiles[1:], strict=False)
    )
    return (
        len(tiles) > 1 and beside and tiles[0].queries.start == tiles[0].keys.start == 0 and len({t.window for t in tiles}) == 1
    )


def flex_refuses(query: Tensor, key: Tensor, value: Tensor, options: Options, machine: Machine) -> str:
    """Why no kernel is compiled for the pattern of this call, or ""."""
    if not machine.flex:
        return "triton is not installed"
    if machine.capability < (8, 0) or query.dtype not in HALF:
        return "patterns are compiled for 16 bits on compute capability 8.0 and later"
    if options.layout == "TND":
        return "patterns are not compiled for packed sequences"
    if options.keep_prob < 1.0:
        return "compiled patterns have no dropout"
    if options.pse is not None and options.pse_type not in (2, 3):
        return "the bias is a tensor"
    if options.atten_mask is not None and options.sparse_mode in (0, 1):
        return "the mask is a tensor"
    heads = key_heads(query, key, options)
    q, k, v = views(query, options, options.head_num), views(key, options, heads), views(value, options, heads)
    if q.shape[2] * k.shape[2] < FLEX_SCORES:
        return f"fewer than {FLEX_SCORES} scores a head"
    if any(size not in (16, 32, 64, 128, 256) for size in (q.shape[-1], v.shape[-1])):
        return f"head sizes {q.shape[-1]} and {v.shape[-1]}"
    return ""
