"""What is asked of the data: weights of a blend, and enough tokens for one sample of each split."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from mindspeed.data_files.index import Index
from mindspeed.errors import DataError

_SPLITS = ("train", "valid", "test")


def read_blend(data_path: Sequence[str], *, flag: str = "--data-path") -> list[tuple[float | None, str]]:
    """(weight, prefix) of each dataset of a blend; weights are None where none are given. Reads as the host does.

    Args:
        data_path: "0.3 a 0.7 b" as four words, or prefixes alone.

    Raises:
        DataError: every weight that is zero, negative, not finite or not a number, at once.
    """
    words = [str(word) for word in data_path]
    if not words:
        raise DataError(f"{flag} is empty: give a prefix, or pairs of a weight and a prefix.")
    numbers = [_number(word) for word in words[0::2]]
    if len(words) == 1 or all(number is None for number in numbers):
        return [(None, word) for word in words]
    problems = []
    if len(words) % 2:
        problems.append(f"{len(words)} words are given, and weights and prefixes come in pairs")
    for number, word, prefix in zip(numbers, words[0::2], words[1::2], strict=False):
        if number is None:
            problems.append(f"{word!r} stands where the weight of {prefix!r} should be")
        elif not math.isfinite(number):
            problems.append(f"the weight {word} of {prefix!r} is not a finite number")
        elif number <= 0:
            problems.append(f"the weight {word} of {prefix!r} is not above zero; leave that dataset out")
    if problems:
        raise DataError(f"{flag} {' '.join(words)}: {'; '.join(problems)}. Give: weight prefix weight prefix ...")
    return [(number, prefix) for number, prefix in zip(numbers, words[1::2], strict=True)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def read_split(split: str) -> tuple[float, float, float]:
    """Fractions of train, valid and test; reads as the host does.

    Raises:
        DataError: it has no parts above zero, or more than three.
    """
    parts = [float(part) for part in re.findall(r"[.0-9]+", split) if part.strip(".")]
    if not parts or len(parts) > 3 or sum(parts) <= 0:
        raise DataError(
            f"--split {split!r}: must be up to three numbers, not all zero, for train, valid and test. Use 969,30,1."
        )
    train, valid, test = (*parts, 0.0, 0.0)[:3]
    total = train + valid + test
    return train / total, valid / total, test / total


def split_tokens(index: Index, split: str) -> tuple[int, int, int]:
    """Tokens that train, valid and test get: the host cuts the list of sequences, not that of tokens."""
    borders = np.cumsum((0.0, *read_split(split)))
    cuts = [round(float(border) * len(index.lengths)) for border in borders]
    sums = [int(index.lengths[start:stop].sum(dtype=np.int64)) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return sums[0], sums[1], sums[2]


def check_enough_tokens(index: Index, seq_length: int, *, split: str = "1,0,0", used: Sequence[str] = ("train",)) -> None:
    """Each split that is used holds at least one sample.

    Args:
        seq_length: tokens per sample; one more is needed for the last label.
        used: of "train", "valid", "test".

    Raises:
        DataError: names the split, what it has and what it needs.
    """
    need = seq_length + 1
    for name, tokens in zip(_SPLITS, split_tokens(index, split), strict=True):
        if name in used and tokens < need:
            fix = "use a shorter --seq-length, more data, or another --split"
            if name != "train":
                fix += ", or --eval-iters 0"
            raise DataError(
                f"{index.prefix}: --split {split} leaves {tokens} tokens for {name}, and one sample of --seq-length {seq_length} "
                f"needs {need}. Remedy: {fix}."
            )
