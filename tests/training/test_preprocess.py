"""Text, JSONL and Parquet become token files that the trainer reads; wrong input is one clear sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mindspeed.cli import preprocess as command
from tests.training.runs import TINY, train

TEXTS = ["first document", "zwéi", "", "the third one " * 20]


def make(folder, source, *words: object) -> IndexedDataset:
    done = command.run(["--input", str(source), "--output-prefix", str(folder / "out"), *map(str, words)])
    assert done == 0
    return IndexedDataset(str(folder / "out_text_document"))


def expected(append: bool = True) -> list[list[int]]:
    return [[*text.encode(), *([256] if append else [])] for text in TEXTS if text]


def written(dataset) -> list[list[int]]:
    return [dataset[i].tolist() for i in range(len(dataset))]


def jsonl(folder, key="text"):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({key: text, "n": i}) + "\n" for i, text in enumerate(TEXTS)), encoding="utf-8")
    return path


BYTES = ("--tokenizer-type", "ByteTokenizer")


@pytest.mark.parametrize("workers", [1, 2])
def test_jsonl(tmp_path, workers):
    dataset = make(tmp_path, jsonl(tmp_path), *BYTES, "--append-eod", "--workers", workers)
    assert written(dataset) == expected()
    assert dataset[0].dtype == np.uint16
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_without_end_of_document(tmp_path):
    assert written(make(tmp_path, jsonl(tmp_path), *BYTES)) == expected(append=False)


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": TEXTS, "other": list(range(len(TEXTS)))})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert written(make(tmp_path, tmp_path / "rows.parquet", *BYTES, "--append-eod")) == expected()


def test_folder_of_text_files_in_sorted_order(tmp_path):
    source = tmp_path / "texts"
    (source / "sub").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (source / "sub" / f"{i}.txt").write_text(text, encoding="utf-8")
    assert written(make(tmp_path, source, *BYTES, "--append-eod")) == expected()


def test_tokenizers_file(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"first": 0, "document": 1, "[UNK]": 2, "<eos>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "tokenizer.json", "--append-eod")
    assert written(make(tmp_path, jsonl(tmp_path), *flags))[0] == [0, 1, 3]


WRONG = [
    ("nowhere.jsonl", "", ["there is no such file"]),
    ("rows.jsonl", '{"text": "a"}\n{"text": \n', ["rows.jsonl:2", "not a line of JSON"]),
    ("rows.jsonl", '{"txt": "a"}\n', ["rows.jsonl:1", "no text under 'text'", "--json-keys"]),
    ("rows.jsonl", '{"text": 7}\n', ["rows.jsonl:1", "no text under 'text'"]),
    ("rows.jsonl", "", ["holds no text"]),
    ("rows.parquet", "not parquet", ["rows.parquet", "cannot be read as Parquet"]),
]


@pytest.mark.parametrize(("name", "content", "told"), WRONG)
def test_wrong_input(tmp_path, capsys, name, content, told):
    if name != "nowhere.jsonl":
        (tmp_path / name).write_text(content)
    status = command.run(["--input", str(tmp_path / name), "--output-prefix", str(tmp_path / "out"), *BYTES])
    assert status == 2
    error = capsys.readouterr().err
    assert all(text in error for text in told), error
    assert not list(tmp_path.glob("out*"))  # nothing half written stays behind


def test_command_line_errors(tmp_path, capsys):
    assert command.run(["--output-prefix", "x"]) == 2
    words = ["--input", str(tmp_path / "nowhere"), "--output-prefix", str(tmp_path / "out"), "--workers", "0"]
    assert command.run(words) == 2
    told = capsys.readouterr().err
    assert "3 problems" in told and all(flag in told for flag in ("--tokenizer-type", "--input", "--workers 0")), told


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--input", str(jsonl(tmp_path)), "--output-prefix", str(tmp_path / "file" / "out"), *BYTES]
    assert command.run(words) == 1
    assert f"{tmp_path / 'file'}: " in capsys.readouterr().err


def test_the_trainer_reads_it(tmp_path):
    make(tmp_path, jsonl(tmp_path), *BYTES, "--append-eod")
    flags = TINY.replace("--mock-data --tokenizer-type NullTokenizer --vocab-size 8191", "--tokenizer-type ByteTokenizer")
    run = train(f"{flags} --split 1,0,0 --data-path {tmp_path}/out_text_document")
    assert [line["skipped"] for line in run.lines] == ["0"] * 3
    assert float(run.curve[0][1]) == pytest.approx(np.log(384), abs=0.2)  # 257 tokens padded to 3 x 128


def test_tokens_outside_of_the_vocabulary_are_named(tmp_path):
    from mindspeed.errors import DataError

    make(tmp_path, jsonl(tmp_path), *BYTES, "--append-eod")
    flags = TINY.replace(
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 8191", "--tokenizer-type NullTokenizer --vocab-size 99"
    )
    with pytest.raises(DataError, match=r"document \d+ .* the vocabulary ends at 99"):
        train(f"{flags} --make-vocab-size-divisible-by 1 --split 1,0,0 --data-path {tmp_path}/out_text_document")


def test_damaged_files_are_refused_before_the_start(tmp_path):
    from mindspeed.errors import DataError

    make(tmp_path, jsonl(tmp_path), *BYTES)
    index = tmp_path / "out_text_document.idx"
    index.write_bytes(index.read_bytes()[:-5])
    flags = TINY.replace("--mock-data --tokenizer-type NullTokenizer --vocab-size 8191", "--tokenizer-type ByteTokenizer")
    with pytest.raises(DataError, match="cut short"):
        train(f"{flags} --split 1,0,0 --data-path {tmp_path}/out_text_document")
