"""The two arrangements of the softmax statistics of packed sequences (TND).

True [T, N, 8] has the rows of a token together. The default of the NPU kernels keeps that shape but lays [N, s_b, 8] blocks, one per
sequence, one after the other; ring attention code depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._transfer import to_device


def block_index(lengths: Tensor, tokens: int, heads: int) -> Tensor:
    """[T, N] positions, in the sequence-block arrangement, of each (token, head); `lengths` [sequences] on any device.

    Tokens after the last sequence form one more block. No synchronisation, so lengths that do not fit are not noticed but cut
    off: the positions are a permutation of all rows whatever the lengths are, and no kernel writes outside of its tensors.
    """
    device = lengths.device
    ends = lengths.clamp(min=0).cumsum(0).clamp(max=tokens)
    ends = torch.cat([ends, ends.new_full((1,), tokens)])
    sizes = ends.diff(prepend=ends.new_zeros(1))
    head, token = torch.arange(heads, device=device), torch.arange(tokens, device=device)
    sequence = torch.searchsorted(ends, token, right=True)
    own, start = sizes[sequence].unsqueeze(1), (ends - sizes)[sequence].unsqueeze(1)
    return start * heads + head * own + token.unsqueeze(1) - start


def to_tokens(statistics: Tensor, index: Tensor) -> Tensor:
    """True [T, N, 8] from sequence blocks."""
    return statistics.reshape(-1, statistics.shape[-1])[index]


def to_blocks(statistics: Tensor, index: Tensor) -> Tensor:
    """Sequence blocks from true [T, N, 8]."""
    blocks = torch.empty_like(statistics, memory_format=torch.contiguous_format)
    blocks.view(-1, statistics.shape[-1])[index.flatten()] = statistics.reshape(-1, statistics.shape[-1])
    return blocks


def lengths_of(ends: list[int], device: torch.device) -> Tensor:
    """Sequence lengths from cumulative ends without leading zero; trailing zeros are unused batches."""
    ends = list(ends)
    while ends and ends[-1] == 0:
        ends.pop()
    return to_device([end - start for start, end in zip([0, *ends[:-1]], ends, strict=bool(ends))], device)
