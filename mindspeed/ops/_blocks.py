"""Row blocks for CPU bodies: a few rows at a time in reused float32 buffers, so that intermediate passes stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20
"""Size of one buffer; measured best among powers of two for the operators here (1 MiB second-level, 32 MiB third-level cache)."""


def row_blocks(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Cut `rows` rows of `row_bytes` bytes into slices of about `block_bytes` per thread."""
    step = block_rows(rows, row_bytes, block_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def block_rows(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows of one block: at least one, at most `rows`."""
    return max(1, min(rows, block_bytes * torch.get_num_threads() // max(row_bytes, 1)))


def widen(source: Tensor, buffer: Tensor) -> Tensor:
    """The block in the buffer's dtype; the source itself if it has that dtype already (callers must not write to it)."""
    return source if source.dtype == buffer.dtype else buffer[: source.shape[0]].copy_(source)
