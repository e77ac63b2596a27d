"""The functions of `megatron.core.datasets.helpers_cpp` in numpy, for machines without a C++ compiler.

Same names, arguments and results as the compiled module. Only the mappings of BERT and T5 are left out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def sample_index(
    sizes: np.ndarray, documents: np.ndarray, seq_length: int, samples: int, extra_token: int, dtype: type
) -> np.ndarray:
    """Where each sample starts in a stream of documents: rows of (position in `documents`, token offset).

    Args:
        sizes: tokens of each document, `[number of documents]`.
        documents: document ids in reading order, epochs included.
        seq_length: tokens per sample, without the extra one.
        samples: number of samples; the result has one row more.
        extra_token: 1 when neighbouring samples share the token between them, else 0.
        dtype: int32 or int64.
    """
    ends = np.concatenate([[0], np.cumsum(sizes[documents], dtype=np.int64)])
    starts = np.arange(samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, starts + (extra_token - 1), side="right") - 1
    positions[0] = 0
    offsets = starts - ends[positions]
    partial = starts + extra_token > ends[-1]  # a last, partial sample ends where the last document ends
    positions[partial] = len(documents) - 1
    offsets[partial] = sizes[documents[-1]] - extra_token
    result: np.ndarray = np.stack([positions, offsets], axis=1).astype(dtype)
    result[0] = 0
    return result


def _build_sample_idx(
    dtype: type,
    sizes: np.ndarray,
    document_idx: np.ndarray,
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last_partial_sequence: bool = True,
    add_extra_token_to_sequence: int = 1,
) -> np.ndarray:
    tokens = int(num_epochs) * int(tokens_per_epoch) - int(add_extra_token_to_sequence)
    samples = tokens // seq_length if drop_last_partial_sequence else math.ceil(tokens / seq_length)
    return sample_index(sizes, document_idx, seq_length, samples, int(add_extra_token_to_sequence), dtype)


def build_sample_idx_int32(*args: Any, **kwargs: Any) -> np.ndarray:
    """Sample index with int32 entries; see `sample_index`."""
    return _build_sample_idx(np.int32, *args, **kwargs)


def build_sample_idx_int64(*args: Any, **kwargs: Any) -> np.ndarray:
    """Sample index with int64 entries; see `sample_index`."""
    return _build_sample_idx(np.int64, *args, **kwargs)


def build_blending_indices(
    dataset_index: np.ndarray,
    dataset_sample_index: np.ndarray,
    weights: np.ndarray,
    num_datasets: int,
    size: int,
    verbose: bool,
) -> None:
    """Fill both arrays so that each prefix follows the weights as closely as integers can (first maximum wins)."""
    weights = np.asarray(weights, dtype=np.float64)[:num_datasets]
    counts = np.zeros(num_datasets, dtype=np.int64)
    for sample in range(size):
        chosen = int(np.argmax(weights * max(sample, 1.0) - counts))
        dataset_index[sample] = chosen
        dataset_sample_index[sample] = counts[chosen]
        counts[chosen] += 1


def build_exhaustive_blending_indices(
    dataset_index: np.ndarray, dataset_sample_index: np.ndarray, sizes: np.ndarray, num_datasets: int
) -> None:
    """Fill both arrays so that dataset i gives exactly `sizes[i]` samples, spread evenly."""
    sizes = np.asarray(sizes, dtype=np.int64)[:num_datasets]
    weights = sizes / float(sizes.sum())
    counts = np.zeros(num_datasets, dtype=np.int64)
    unspent = np.ones(num_datasets, dtype=bool)
    sample = 0
    while unspent.any():
        errors = np.where(unspent, weights * max(sample, 1.0) - counts, -np.inf)
        chosen = int(np.argmax(errors))
        dataset_index[sample] = chosen
        dataset_sample_index[sample] = counts[chosen]
        counts[chosen] += 1
        unspent[chosen] = sizes[chosen] != counts[chosen]
        sample += 1


def build_mapping(*args: Any, **kwargs: Any) -> None:
    """BERT and T5 sentence mapping.

    Raises:
        RuntimeError: always; only the compiled module has it.
    """
    raise RuntimeError("sentence mappings need the compiled megatron.core.datasets.helpers_cpp; install a C++ compiler")


build_blocks_mapping = build_mapping
