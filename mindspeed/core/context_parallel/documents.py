"""Documents inside packed samples: where they end, and positions that restart with each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed.errors import ConfigError, Problem


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


def equal_documents(tokens: Tensor, size: int) -> tuple[tuple[int, ...], ...]:
    """Per sample 0, size, 2 size, ..., S, whatever the tokens [B, S] say; the last document may be shorter."""
    samples, length = tokens.shape
    return ((*range(0, length, size), length),) * samples


def end_of_document(tokenizer: Any) -> int:
    """Id of the token that ends a document.

    Raises:
        ConfigError: the tokenizer has none.
    """
    try:
        token = tokenizer.eod
    except (AttributeError, NotImplementedError):
        token = None
    if token is None or token < 0:  # a SentencePiece model without the token answers -1
        rule = f"needs a token that ends a document, which {type(tokenizer).__name__} has not"
        raise ConfigError([Problem("--reset-attention-mask", None, rule, "choose another tokenizer or remove the flag")])
    return int(token)


def restarted_positions(boundaries: Sequence[int]) -> Tensor:
    """Positions [S] (int64) that start at 0 in each document."""
    starts = torch.tensor(boundaries[:-1])
    lengths = torch.tensor(boundaries).diff()
    return torch.arange(int(boundaries[-1])) - starts.repeat_interleave(lengths)
