"""Fixed random tokens: sample i is the same in every layout and process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


class TinyTokens(Dataset[dict[str, torch.Tensor]]):
    """`length` samples of `seq_length` tokens below `vocabulary`, as megatron-core's GPT data sets return them."""

    def __init__(self, length: int, seq_length: int, vocabulary: int) -> None:
        self.length = length
        self.seq_length = seq_length
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = torch.randint(0, self.vocabulary, (self.seq_length + 1,), generator=torch.Generator().manual_seed(index))
        mask = torch.ones(self.seq_length)
        mask[index % self.seq_length] = 0  # losses must be weighed by their tokens
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.seq_length),
        }


def provider_for(seq_length: int, vocabulary: int) -> Any:
    """A `train_valid_test_datasets_provider` of `TinyTokens`, for the trainer and for Megatron-LM."""

    def provide(num_samples: Sequence[int]) -> tuple[Any, Any, Any]:
        return tuple(TinyTokens(count, seq_length, vocabulary) if count else None for count in num_samples)  # type: ignore[return-value]

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide
