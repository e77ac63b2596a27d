"""Documents inside packed samples: where they end, and positions that restart with each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def boundaries_of(tokens: Tensor, eod: int) -> tuple[tuple[int, ...], ...]:
    """Per sample 0, the end of each document, ..., S.

    A document is everything after the previous end-of-document token up to and including its own. A sample that ends
    with that token has no empty document behind it.

    Args:
        tokens: [B, S] token ids.
        eod: id of the end-of-document token.
    """
    length = tokens.shape[1]
    ends = (tokens == eod).cpu()
    return tuple((0, *(end + 1 for end in row.nonzero().flatten().tolist() if end + 1 < length), length) for row in ends)


def restarted_positions(boundaries: Sequence[int]) -> Tensor:
    """Positions [S] (int64) that start at 0 in each document."""
    starts = torch.tensor(boundaries[:-1])
    lengths = torch.tensor(boundaries).diff()
    return torch.arange(int(boundaries[-1])) - starts.repeat_interleave(lengths)
