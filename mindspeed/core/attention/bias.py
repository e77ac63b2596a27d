"""Additive biases that are made part by part: masks, ALiBi, and sums of them. See `Bias` in the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SumOfBiases:
    """Several biases at once: a mask and ALiBi."""

    parts: tuple[Callable[[range, range], Tensor], ...]

    def __call__(self, rows: range, keys: range) -> Tensor:
        """Sum of the parts for these rows and keys."""
        total = self.parts[0](rows, keys)
        for part in self.parts[1:]:
            total = total + part(rows, keys).to(total.device)
        return total


@dataclass(frozen=True)
class MaskBias:
    """-inf where a boolean mask [rows, keys] hides, made part by part."""

    hidden: Tensor

    def __call__(self, rows: range, keys: range) -> Tensor:
        """Additive fp32 mask of these rows and keys."""
        part = self.hidden[rows.start : rows.stop, keys.start : keys.stop]
        return torch.zeros(part.shape, device=part.device).masked_fill_(part, float("-inf"))


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": lambda difference: -difference.abs(),
    "root": lambda difference: -difference.abs().sqrt(),
    "signed": lambda difference: difference,
}


@dataclass(frozen=True)
class AlibiBias:
    """Slope x distance of global positions, made part by part; arXiv 2108.12409.

    The distance of query i and key j is -|i - j|, -sqrt|i - j| or j - i.
    """

    slopes: Tensor
    query_positions: Tensor
    key_positions: Tensor
    distance: str = "absolute"

    def __call__(self, rows: range, keys: range) -> Tensor:
        """Additive fp32 bias [1, N, rows, keys]."""
        device = self.slopes.device
        query = self.query_positions[rows.start : rows.stop].to(device, torch.float32)
        key = self.key_positions[keys.start : keys.stop].to(device, torch.float32)
        return self.slopes.view(1, -1, 1, 1) * DISTANCES[self.distance](key[None, :] - query[:, None])

    def starts(self) -> tuple[int, int] | None:
        """First query and key position, when both are contiguous; None else, and for positions that are not in host memory."""
        found = tuple(_start(positions) for positions in (self.query_positions, self.key_positions))
        return None if None in found else found  # type: ignore[return-value]


def _start(positions: Tensor) -> int | None:
    if positions.device.type != "cpu" or bool((positions.diff() != 1).any()):
        return None
    return int(positions[0])
