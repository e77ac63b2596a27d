"""Row blocks for CPU bodies: a few rows at a time in reused float32 buffers, so that intermediate passes stay in the cache."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20
"""Size of one buffer; measured best among powers of two for the operators here (1 MiB second-level, 32 MiB third-level cache)."""

LARGE_BYTES = 8 << 20
_LARGE_PAGE = 2 << 20
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU for an output that is written once from front to back.

    The allocator takes a large output fresh from the kernel at every call, and touching it page by page costs more than the
    arithmetic of a streaming operator: 128 MiB in pages of 4 KiB took 60 to 85 ms, in pages of 2 MiB 19 ms. So from
    `LARGE_BYTES` on, large pages are asked for, as torch itself does under THP_MEM_ALLOC_ENABLE=1. Only whole large pages
    inside of the tensor are named, so it takes no more memory. A kernel that has none refuses, which changes nothing.
    """
    out = torch.empty(shape, dtype=dtype)
    if _madvise is not None and out.nbytes >= LARGE_BYTES:
        start = -(-out.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        stop = (out.data_ptr() + out.nbytes) // _LARGE_PAGE * _LARGE_PAGE
        _madvise(start, stop - start, mmap.MADV_HUGEPAGE)
    return out


def row_blocks(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Cut `rows` rows of `row_bytes` bytes into slices of about `block_bytes` per thread."""
    step = block_rows(rows, row_bytes, block_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def block_rows(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows of one block: at least one, at most `rows`."""
    return max(1, min(rows, block_bytes * torch.get_num_threads() // max(row_bytes, 1)))


def column_sums(values: Tensor) -> Tensor:
    """[H] sums of [..., H] over all rows; zeros without rows."""
    return values.reshape(values.shape[:-1].numel(), values.shape[-1]).sum(0)


def widen(source: Tensor, buffer: Tensor) -> Tensor:
    """The block in the buffer's dtype; the source itself if it has that dtype already (callers must not write to it)."""
    return source if source.dtype == buffer.dtype else buffer[: source.shape[0]].copy_(source)
