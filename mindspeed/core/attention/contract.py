"""What every attention kernel takes and gives.

Shapes: q [B, N, Sq, D], k [B, G, Sk, D], v [B, G, Sk, Dv] with N a multiple of G; strided views are fine.
A kernel returns `out` [B, N, Sq, Dv] in the input's dtype or wider, and the log-sum-exp of the scaled, masked
scores `lse` [B, N, Sq] in fp32 (fp64 for fp64 inputs). A row that sees no key has out 0 and lse -inf.

Backward takes the *global* `out` and `lse` of the whole row, so that gradients of tiles add up to the exact
gradient: P = exp(scores - lse), delta = rowsum(dout * out), dS = P * (dP - delta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mindspeed.core.attention.dropout import Dropout


@dataclass(frozen=True)
class Visibility:
    """Key j is seen by query i of a tile iff -past <= j + shift - i <= future; None is no limit.

    `shift` is the global position of the tile's first key minus that of its first query.
    """

    past: int | None = None
    future: int | None = None
    shift: int = 0

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self.past is None and self.future is None

    @property
    def is_causal(self) -> bool:
        """Whether this is the plain lower triangle, aligned at the upper left corner."""
        return self.past is None and self.future == 0 and self.shift == 0

    def key_range(self, rows: range, num_keys: int) -> range:
        """Keys that at least one of these rows may see, as one contiguous range (possibly empty)."""
        first = 0 if self.past is None else max(0, rows.start - self.past - self.shift)
        stop = num_keys if self.future is None else min(num_keys, rows.stop + self.future - self.shift)
        return range(first, max(first, stop))

    def mask(self, rows: range, keys: range, device: torch.device) -> Tensor | None:
        """Boolean [rows, keys], True where hidden; None where all of it is visible."""
        lowest = keys.start + self.shift - (rows.stop - 1)
        highest = keys.stop - 1 + self.shift - rows.start
        if (self.past is None or lowest >= -self.past) and (self.future is None or highest <= self.future):
            return None
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        distance = torch.arange(keys.start, keys.stop, device=device)[None, :] + self.shift - row
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.past is not None:
            hidden |= distance < -self.past
        if self.future is not None:
            hidden |= distance > self.future
        return hidden


FULL = Visibility()
CAUSAL = Visibility(future=0)


Bias = Tensor | Callable[[range, range], Tensor]


@dataclass(frozen=True)
class Scoring:
    """How scores of a tile are made: scale, what is visible, additive bias, dropout.

    `bias` is fp32, broadcastable to [B, N, Sq, Sk], or a function of (rows, keys) that makes that part of it, so that
    long sequences never hold all of it; -inf hides. It gets no gradient. `memory_order` ("SBH" or "BNSD") is the
    arrangement in which a kernel that reads several of them gets the tensors; it never changes a result.
    """

    scale: float
    visible: Visibility = FULL
    bias: Bias | None = None
    dropout: Dropout | None = None
    memory_order: str = "SBH"

    @property
    def is_plain(self) -> bool:
        """Whether a kernel that knows full and causal squares only can serve it."""
        return self.bias is None and (self.visible.is_full or self.visible.is_causal)


class Kernel(Protocol):
    """One way to compute a tile. `rng_state` is whatever forward needs to hand to backward."""

    name: str

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Why this kernel cannot serve the call, or an empty string."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """Return (out, lse, rng_state)."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scoring: Scoring,
        rng_state: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of this tile, from the global `out` and `lse`."""
        ...


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of scores, statistics and accumulators."""
    return torch.float64 if dtype == torch.float64 else torch.float32
