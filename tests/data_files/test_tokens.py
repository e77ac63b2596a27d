"""Tokens outside of the vocabulary, in files, in batches and in samples of the host's dataset."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch

from mindspeed.data_files import GuardedSamples, check_indexed_dataset, check_token_ids, check_vocab, locate
from mindspeed.data_files import tokens as tokens_module
from mindspeed.errors import DataError
from tests.data_files._build import SMALL, build


@pytest.fixture
def index(tmp_path):
    return check_indexed_dataset(build(tmp_path / "small", SMALL))


def test_first_token_outside_is_named_with_its_document(index):
    assert check_vocab(index, 11)
    with pytest.raises(DataError, match=r"small\.bin: byte 16: document 3 \(sequence 4\) holds the token 9.*ends at 8"):
        check_vocab(index, 9)
    with pytest.raises(DataError, match=r"document 0 \(sequence 1\) holds the token 4"):
        check_vocab(index, 4)


def test_negative_tokens(tmp_path):
    index = check_indexed_dataset(build(tmp_path / "negative", [[[1, 2]], [[3, -5]]], np.int32))
    with pytest.raises(DataError, match=r"document 1 .*token -5"):
        check_vocab(index, 100)


def test_vocabulary_checked_at_open(tmp_path):
    with pytest.raises(DataError, match="document 3"):
        check_indexed_dataset(build(tmp_path / "data", SMALL), vocab_size=10)


def test_progress_and_blocks(index, monkeypatch):
    monkeypatch.setattr(tokens_module, "_BLOCK", 4)
    seen = []
    assert check_vocab(index, 11, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    with pytest.raises(DataError, match="token 10"):
        check_vocab(index, 10)


def test_time_limit(index, monkeypatch):
    monkeypatch.setattr(tokens_module, "_BLOCK", 4)
    assert not check_vocab(index, 11, seconds=0.0)
    assert "was not found within 0 s" in locate([index], 10, seconds=0.0)


def test_small_dtype_needs_no_reading(tmp_path):
    index = check_indexed_dataset(build(tmp_path / "bytes", SMALL, np.uint8))
    index.bin_path.unlink()
    assert check_vocab(index, 256)


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
class TestBatch:
    def test_good(self, make):
        check_token_ids(make([[0, 1], [2, 3]]), 4)
        check_token_ids(make([[]]), 4)

    def test_bad(self, make):
        with pytest.raises(DataError, match=r"token 4 at \(1, 0\), and the vocabulary ends at 3"):
            check_token_ids(make([[0, 1], [4, 3]]), 4)
        with pytest.raises(DataError, match=r"token -1 at \(0, 1\)"):
            check_token_ids(make([[0, -1], [2, 3]]), 4)

    def test_document_is_looked_up(self, make, index):
        with pytest.raises(DataError, match=r"token 10 at \(0,\).*small\.bin.*document 3 \(sequence 4\)"):
            check_token_ids(make([10]), 10, where=partial(locate, [index], 10))

    def test_lookup_without_a_finding(self, make, index):
        with pytest.raises(DataError, match="Use the tokenizer"):
            check_token_ids(make([10]), 10, where=partial(locate, [], 10))


def gpt_dataset(prefix, tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod, unique_identifiers = 0, {"name": "none"}

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=4,
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    data = IndexedDataset(prefix)
    return GPTDataset(data, prefix, np.arange(len(data), dtype=np.int32), 4, Split.train, config)


def test_samples_of_the_hosts_dataset(tmp_path):
    documents = [[list(range(1, 20))] for _ in range(6)]
    documents[4] = [[99] * 19]
    prefix = build(tmp_path / "data", documents)
    samples = GuardedSamples(gpt_dataset(prefix, tmp_path), 32, prefix=prefix)
    assert len(samples) == len(samples.dataset)
    assert samples.config.sequence_length == 4
    found = []
    for item in range(len(samples)):
        try:
            samples[item]
        except DataError as error:
            found.append(str(error))
    assert found
    for text in found:
        assert "token 99" in text
        assert " 4" in text.split("made of document")[1].split(f" of {prefix}")[0]
    assert "labels" in GuardedSamples(samples.dataset, 100)[0]


def test_guard_can_be_copied_to_loader_processes():
    guard = GuardedSamples([{"tokens": torch.tensor([5])}], 4)
    for twin in (copy.copy(guard), pickle.loads(pickle.dumps(guard))):
        with pytest.raises(DataError, match=r"sample 0\."):
            twin[0]
