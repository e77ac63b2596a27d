"""The order of samples, tokenizers, and text drawn from a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed.errors import DataError
from mindspeed.training.data import CyclicSampler, SequentialSampler
from mindspeed.training.sampling import sample
from mindspeed.training.tokenizers import ByteTokenizer, NullTokenizer, build_tokenizer, padded_vocab_size


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(0, 40))
def test_ranks_share_the_samples_in_order(ranks, size, steps_before, extra):
    unit = ranks * size
    consumed = steps_before * unit
    total = consumed + unit + extra
    samplers = [list(SequentialSampler(total, consumed, size, rank, ranks)) for rank in range(ranks)]
    joined = [index for step in zip(*samplers, strict=True) for batch in step for index in batch]
    assert joined == list(range(consumed, consumed + len(joined)))
    assert total - (consumed + len(joined)) < unit  # only an incomplete batch is dropped
    assert {len(SequentialSampler(total, consumed, size, rank, ranks)) for rank in range(ranks)} == {len(samplers[0])}


def test_used_up_samples():
    with pytest.raises(DataError, match="8 samples and 8 are used up"):
        SequentialSampler(8, 8, 1, 0, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 30), st.booleans(), st.integers(0, 6))
def test_an_epoch_meets_every_sample_once_and_resumes_in_the_middle(ranks, size, extra, sharding, used):
    unit = ranks * size
    total = 3 * unit + extra
    whole = [list(CyclicSampler(total, 0, size, rank, ranks, sharding=sharding)) for rank in range(ranks)]
    seen = [index for batches in whole for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(total))
    steps = min(used, total // unit - 1)
    rest = [list(CyclicSampler(total, steps * unit, size, rank, ranks, sharding=sharding)) for rank in range(ranks)]
    for rank in range(ranks):
        assert rest[rank] == whole[rank][steps : steps + len(rest[rank])]


def test_epochs_differ():
    sampler = CyclicSampler(12, 0, 2, 0, 1, sharding=True)
    first, second = list(sampler), list(sampler)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(12)) and first != second


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    ids = tokenizer.tokenize("Grüße")
    assert ids == list("Grüße".encode()) and tokenizer.detokenize([*ids, 256]) == "Grüße"
    assert (tokenizer.vocab_size, tokenizer.eod, len(tokenizer.vocab), tokenizer.inv_vocab[256]) == (257, 256, 257, "<eod>")
    with pytest.raises(NotImplementedError):
        _ = tokenizer.pad  # a pad id would be masked out of the loss


def test_null_tokenizer():
    tokenizer = NullTokenizer(100)
    assert tokenizer.tokenize("3 14 15") == [3, 14, 15] and tokenizer.detokenize([3, 14]) == "3 14"
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)


def named(tmp_path, **values):
    from argparse import Namespace

    defaults = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": None, "vocab_file": None, "merge_file": None}
    return Namespace(**{**defaults, **values})


def word_file(tmp_path, end: str | None):
    from tokenizers import Tokenizer, models

    words = {"a": 0, "b": 1, **({end: 2} if end else {})}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))


def test_end_token_by_configuration(tmp_path):
    word_file(tmp_path, "<stop>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    tokenizer = build_tokenizer(named(tmp_path, tokenizer_model=str(tmp_path)))
    assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.inv_vocab[1]) == (2, 3, "b")


def test_end_token_by_custom_and_without(tmp_path):
    word_file(tmp_path, "<|endoftext|>")
    assert build_tokenizer(named(tmp_path, tokenizer_model=str(tmp_path / "tokenizer.json"))).eod == 2
    word_file(tmp_path, None)
    with pytest.raises(DataError, match="no end-of-document token"):
        build_tokenizer(named(tmp_path, tokenizer_model=str(tmp_path)))


def test_broken_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a file of the `tokenizers` library"):
        build_tokenizer(named(tmp_path, tokenizer_model=str(tmp_path)))
    with pytest.raises(DataError, match="--vocab-file None: there is no such file"):
        build_tokenizer(named(tmp_path, tokenizer_type="GPT2BPETokenizer"))


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"a line with number {i} and words" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=40, minloglevel=2)
    tokenizer = build_tokenizer(
        named(tmp_path, tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "m.model"))
    )
    assert tokenizer.detokenize(tokenizer.tokenize("a line with words")) == "a line with words"
    assert tokenizer.vocab_size == 40 and tokenizer.inv_vocab[tokenizer.eod] == "</s>"


@pytest.mark.parametrize(
    ("tokens", "divisor", "ranks", "size"), [(257, 128, 1, 384), (257, 128, 2, 512), (256, 128, 2, 256), (8192, 64, 2, 8192)]
)
def test_padded_vocabulary(tokens, divisor, ranks, size):
    assert padded_vocab_size(tokens, divisor, ranks) == size


class Counting(torch.nn.Module):
    """Gives all weight to the successor of the last token, and remembers the longest context."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.longest = 0

    def forward(self, tokens, positions, mask):
        self.longest = max(self.longest, tokens.shape[1])
        assert positions.shape == tokens.shape
        return torch.nn.functional.one_hot((tokens + 1) % 12, 16).float() * 1000 + self.weight


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_sampling_takes_the_likely_and_never_the_padding(temperature):
    model = Counting()
    ids = sample(model, [3], 12, context=5, vocab_size=10, temperature=temperature)
    assert ids[:6] == [4, 5, 6, 7, 8, 9] and np.max(ids) < 10
    assert model.longest == 5 and model.training
