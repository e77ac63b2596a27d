"""Text to token files: JSONL, Parquet or plain text in, `.bin` and `.idx` of megatron-core out."""

from __future__ import annotations

import argparse
import glob
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindspeed.errors import ConfigError, DataError, Problem
from mindspeed.training.flag_kinds import int_flag
from mindspeed.training.flags_run import TOKENIZER
from mindspeed.training.progress import on_terminal
from mindspeed.training.tokenizers import build_tokenizer

FORMATS = ("auto", "jsonl", "parquet", "text")
WORK = (
    int_flag("--workers", 1, "Processes that tokenize.", at_least=1),
    int_flag("--log-interval", 10000, "Documents between progress lines.", at_least=1),
)
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Summary:
    """What was written: file prefixes, documents, tokens and seconds."""

    prefixes: tuple[str, ...]
    documents: int
    tokens: int
    seconds: float


def build_parser() -> argparse.ArgumentParser:
    """Parser of `mindspeed preprocess`: the flags of Megatron-LM's tool and a few more."""
    parser = argparse.ArgumentParser(prog="mindspeed preprocess", allow_abbrev=False, description=__doc__)
    parser.add_argument("--input", required=True, nargs="+", help="Files, folders or patterns.")
    parser.add_argument("--output-prefix", required=True, help="Path of the files to write, without suffix.")
    parser.add_argument(
        "--input-format", choices=FORMATS, default="auto", help="By the suffix if not given; other files are text."
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="Keys (JSONL) or columns (Parquet) to tokenize.")
    parser.add_argument("--append-eod", action="store_true", help="End every document with the end-of-document token.")
    for flag in (*WORK, *TOKENIZER):
        flag.add_to(parser)
    return parser


def input_files(word: str) -> list[Path]:
    """Files that a word of `--input` stands for: itself, those of a folder or those that match a pattern, sorted."""
    path = Path(word)
    if path.is_dir():
        return sorted(child for child in path.rglob("*") if child.is_file())
    if path.is_file():
        return [path]
    return sorted(Path(name) for name in glob.glob(word, recursive=True) if os.path.isfile(name))


def check(args: argparse.Namespace) -> list[Path]:
    """The input files of a command line.

    Raises:
        ConfigError: with everything that is wrong with the command line.
    """
    problems = [problem for flag in (*WORK, *TOKENIZER) for problem in flag.problems(getattr(args, flag.dest))]
    if args.tokenizer_type is None:
        problems.append(Problem("--tokenizer-type", None, "is required", "use ByteTokenizer, which needs no file"))
    found = {word: input_files(word) for word in args.input}
    problems += [
        Problem("--input", word, "there is no such file, no folder with files, and nothing that matches", "check the path")
        for word, files in found.items()
        if not files
    ]
    if problems:
        raise ConfigError(problems)
    return [path for files in found.values() for path in files]


def documents(path: Path, form: str, keys: Sequence[str]) -> Iterator[dict[str, str]]:
    """Documents of a file, as text by key. A text file is one document under the first key.

    Raises:
        DataError: a line or row that is not what the format says, with its number.
    """
    form = _SUFFIXES.get(path.suffix.lower(), "text") if form == "auto" else form
    if form == "text":
        yield {keys[0]: path.read_bytes().decode("utf-8", errors="replace")}
        return
    rows = _json_rows(path) if form == "jsonl" else _parquet_rows(path, keys)
    for number, row in rows:
        missing = [key for key in keys if not isinstance(row.get(key), str)]
        if missing:
            there = ", ".join(row) or "nothing"
            raise DataError(
                f"{path}:{number}: no text under {missing[0]!r} (there is {there}). Name the keys with --json-keys."
            )
        yield {key: row[key] for key in keys}


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("a line must be an object")
                    yield number, row
        except ValueError as error:  # of json, and of text that is not UTF-8
            raise DataError(f"{path}:{number}: not a line of JSON ({error}). Repair or remove the line.") from error


def _parquet_rows(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: reading Parquet needs the package: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(path)
        columns = [key for key in keys if key in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


class Encoder:
    """Turns documents into ids; built once per worker process."""

    tokenizer: Any = None

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def start(self) -> None:
        """Build the tokenizer of this process."""
        Encoder.tokenizer = build_tokenizer(self._args)

    def encode(self, document: dict[str, str]) -> dict[str, list[int]]:
        """Ids by key."""
        end = [Encoder.tokenizer.eod] if self._args.append_eod else []
        ids = {key: list(Encoder.tokenizer.tokenize(text)) for key, text in document.items()}
        return {key: [*words, *end] if words else [] for key, words in ids.items()}


def preprocess(args: argparse.Namespace) -> Summary:
    """Tokenize all input and write one pair of files per key.

    Raises:
        ConfigError, DataError: nothing usable was written.
    """
    begun = time.perf_counter()
    files = check(args)
    encoder = Encoder(args)
    encoder.start()  # here too: a wrong tokenizer is found before workers exist
    texts = (document for path in files for document in documents(path, args.input_format, args.json_keys))
    with ExitStack() as stack:
        if args.workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(args.workers, encoder.start))
            encoded: Iterable[dict[str, list[int]]] = pool.imap(encoder.encode, texts, chunksize=32)
        else:
            encoded = map(encoder.encode, texts)
        counts = _write(encoded, args, Encoder.tokenizer.vocab_size)
    prefixes = tuple(_prefix(args.output_prefix, key) for key in args.json_keys)
    return Summary(prefixes, *counts, time.perf_counter() - begun)


def _prefix(output: str, key: str) -> str:
    return f"{output}_{key}_document"


@contextmanager
def _telling(interval: int) -> Iterator[Callable[[int, int], None]]:
    """How far the work is: an updating line on a terminal, elsewhere a line every `interval` documents."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not on_terminal():

        def print_sometimes(count: int, tokens: int) -> None:
            if count % interval == 0:
                print(f"processed {count} documents, {tokens} tokens", flush=True)

        yield print_sometimes
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True) as line:
        task = line.add_task("tokenizing", total=None)
        yield lambda count, tokens: line.update(task, description=f"{count:,} documents, {tokens:,} tokens")


def _write(encoded: Iterable[dict[str, list[int]]], args: argparse.Namespace, vocab_size: int) -> tuple[int, int]:
    """Write ids as they come, under temporary names that are replaced at the end; returns documents and tokens."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    names = {key: _prefix(args.output_prefix, key) for key in args.json_keys}
    part = f".part{os.getpid()}"
    builders = {
        key: IndexedDatasetBuilder(name + part + ".bin", DType.optimal_dtype(vocab_size)) for key, name in names.items()
    }
    count = tokens = 0
    try:
        with _telling(args.log_interval) as tell:
            for document in encoded:
                for key, ids in document.items():
                    if ids:
                        builders[key].add_document(torch.from_numpy(np.asarray(ids, dtype=np.int64)), [len(ids)])
                        tokens += len(ids)
                count += 1
                tell(count, tokens)
        if tokens == 0:
            raise DataError(f"--input {' '.join(args.input)}: holds no text. Nothing was written.")
        for key, name in names.items():
            builders[key].finalize(name + part + ".idx")
            os.replace(name + part + ".bin", name + ".bin")
            os.replace(name + part + ".idx", name + ".idx")
    finally:
        for name in names.values():
            for suffix in (".bin", ".idx"):
                Path(name + part + suffix).unlink(missing_ok=True)
    return count, tokens
