"""Datasets made by the host's own builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def build(prefix: Path, documents: list[list[list[int]]], dtype=np.uint16) -> str:
    """Write documents, each a list of sequences of token ids; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for tokens in sequences:
            builder.add_item(torch.tensor(tokens, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


SMALL = [[[1, 2, 3], [4, 5]], [[6]], [[]], [[7, 8, 9, 10]]]
