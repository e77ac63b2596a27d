"""Dropout of attention weights whose mask is a function of places: it does not matter who computes a tile, or how it is cut.

Kernels that draw from a random generator of their own take the tile's seed instead; their masks belong to tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Multipliers of two hash functions: Vigna's for 64-bit keys of rows and columns, Wellons' "lowbias32" for single scores.
_WIDE = (-0x61C8864680B583EB, 0x2545F4914F6CDD1D)
_NARROW = (0x7FEB352D, -0x7B935975)
_RANGE = 1 << 31


@dataclass(frozen=True, eq=False)
class Dropout:
    """Dropout on normalised probabilities, the same in forward and in backward.

    The log-sum-exp ignores dropout, so dropping per tile and merging equals dropping in the whole row.

    Attributes:
        probability: of a weight to become 0; the others grow by 1 / (1 - probability).
        seed: of this tile, for kernels with a random generator.
        whole: seed of the attention that the tile belongs to; `seed` itself when there are no tiles.
        head, sample: first query head and first sample of the tile.
        queries, keys: positions [Sq] and [Sk] of the tile in the sequence; counted from 0 when absent.
    """

    probability: float
    seed: int
    whole: int | None = None
    head: int = 0
    sample: int = 0
    queries: Tensor | None = None
    keys: Tensor | None = None

    def of_heads(self, first: int) -> Dropout:
        """For a device that computes the query heads from `first` on."""
        return replace(self, head=first)

    def of_tile(self, queries: Tensor, keys: Tensor, sample: int) -> Dropout:
        """For a tile of queries and keys at these positions, of samples from `sample` on."""
        seed = self.seed
        for part in (int(queries[0]), int(keys[0]), sample, self.head):
            seed = ((seed ^ part) * 0x2545F4914F6CDD1D + 0x9E3779B97F4A7C15) & (2**63 - 1)
        return replace(self, seed=seed, whole=self.seed, sample=sample, queries=queries, keys=keys)

    def multipliers(self, batch: int, heads: int, rows: range, keys: range, like: Tensor) -> Tensor:
        """0 or 1 / (1 - probability) for some rows and keys of the tile, [batch, heads, rows, keys] in the dtype of `like`.

        Row keys and column keys are hashed in 64 bits and their sum in 32, all in integers: every device gets the same mask.
        """
        whole = torch.tensor(self.seed if self.whole is None else self.whole, dtype=torch.int64, device="cpu")
        samples, heads_ = _from(self.sample, batch), _from(self.head, heads)
        origin = _hash(_hash(_hash(whole) ^ samples[:, None]) ^ heads_)[..., None]
        row = _high_half(_hash(origin ^ 2 * _places(self.queries, rows))).to(like.device)
        column = _high_half(_hash(origin ^ 2 * _places(self.keys, keys) + 1)).to(like.device)
        mixed = row[..., None] + column[..., None, :]
        # An arithmetic shift folds the sign away: two values that are each other's complement become one, so that the
        # result is uniform over the numbers from 0 to 2^31 - 1.
        for shift, factor in zip((16, 15), _NARROW, strict=True):
            mixed ^= mixed >> shift
            mixed *= factor
        mixed ^= mixed >> 16
        if self.probability >= 1:
            return torch.zeros_like(mixed, dtype=like.dtype)
        kept = mixed >= min(int(self.probability * _RANGE), _RANGE - 1)
        return kept.to(like.dtype).div_(1.0 - self.probability)


def _places(positions: Tensor | None, part: range) -> Tensor:
    """int64 positions of a part of the tile's rows or keys, in host memory."""
    if positions is None:
        return _from(part.start, len(part))
    return positions[part.start : part.stop].cpu()


def _from(first: int, count: int) -> Tensor:
    """Consecutive int64 numbers in host memory, whatever the default device is."""
    return torch.arange(first, first + count, device="cpu")


def _hash(value: Tensor) -> Tensor:
    """Mix the bits of int64 numbers."""
    value = (value ^ (value >> 32)) * _WIDE[0]
    value = (value ^ (value >> 29)) * _WIDE[1]
    return value ^ (value >> 32)


def _high_half(value: Tensor) -> Tensor:
    """The upper 32 bits of int64 numbers as int32."""
    return (value >> 32).to(torch.int32)
