"""Weights of blends, splits, and data too short for one sample."""

from __future__ import annotations

import pytest

from mindspeed.data_files import check_enough_tokens, check_indexed_dataset, read_blend, read_split, split_tokens
from mindspeed.errors import DataError
from tests.data_files._build import build


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], [(None, "a")]),
        (["7"], [(None, "7")]),
        (["a", "b"], [(None, "a"), (None, "b")]),
        (["a", "b", "c"], [(None, "a"), (None, "b"), (None, "c")]),
        (["0.3", "a", "7e-1", "b"], [(0.3, "a"), (0.7, "b")]),
        (["30", "a", "70", "b"], [(30.0, "a"), (70.0, "b")]),
    ],
)
def test_blends_are_read_as_the_host_reads_them(words, expected):
    from megatron.core.datasets.utils import get_blend_from_list

    assert read_blend(words) == expected
    prefixes, weights = get_blend_from_list(words)
    assert list(prefixes) == [prefix for _, prefix in expected]
    assert weights == (None if expected[0][0] is None else [weight for weight, _ in expected])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["0", "a", "1", "b"], "the weight 0 of 'a' is not above zero"),
        (["1", "a", "-0.5", "b"], "the weight -0.5 of 'b' is not above zero"),
        (["nan", "a", "1", "b"], "the weight nan of 'a' is not a finite number"),
        (["1", "a", "inf", "b"], "the weight inf of 'b'"),
        (["1", "a", "x", "b"], "'x' stands where the weight of 'b'"),
        (["1", "a", "2"], "3 words"),
        ([], "is empty"),
    ],
)
def test_bad_blends(words, complaint):
    with pytest.raises(DataError, match="^--data-path") as caught:
        read_blend(words)
    assert complaint in str(caught.value)


def test_all_bad_weights_at_once():
    with pytest.raises(DataError) as caught:
        read_blend(["0", "a", "nan", "b", "-1", "c"], flag="--train-data-path")
    assert all(f"'{name}'" in str(caught.value) for name in "abc")
    assert str(caught.value).startswith("--train-data-path")


def test_splits():
    assert read_split("969,30,1") == (0.969, 0.03, 0.001)
    assert read_split("3/1") == (0.75, 0.25, 0.0)
    for bad in ("", "0,0,0", "x", "1,2,3,4"):
        with pytest.raises(DataError, match="--split"):
            read_split(bad)


def test_too_few_tokens(tmp_path):
    index = check_indexed_dataset(build(tmp_path / "data", [[[1] * 10]] * 10))
    assert split_tokens(index, "8,1,1") == (80, 10, 10)
    check_enough_tokens(index, 79, split="8,1,1")
    check_enough_tokens(index, 9, split="8,1,1", used=("train", "valid", "test"))
    with pytest.raises(DataError, match="leaves 80 tokens for train.*--seq-length 80 needs 81"):
        check_enough_tokens(index, 80, split="8,1,1")
    with pytest.raises(DataError, match="leaves 10 tokens for valid.*--eval-iters 0"):
        check_enough_tokens(index, 10, split="8,1,1", used=("train", "valid"))


def test_split_cuts_like_the_hosts_builder(tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    index = check_indexed_dataset(build(tmp_path / "data", [[[1] * length] for length in lengths]))
    for split in ("969,30,1", "1,1,1", "7,2,1", "50,50", "0,1,0"):
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        expected = []
        for part in matrix:
            start, stop = (int(round(border * float(len(lengths)))) for border in part) if part else (0, 0)
            expected.append(sum(lengths[start:stop]))
        assert list(split_tokens(index, split)) == expected
