"""Tokenizers of the trainer: bytes, plain numbers, GPT-2 BPE, `tokenizers` files and SentencePiece models.

All of them subclass megatron-core's MegatronTokenizer, so its datasets accept them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer

from mindspeed.errors import DataError

_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")


class ByteTokenizer(MegatronTokenizer):
    """UTF-8 bytes as ids 0-255 and 256 as end of document; nothing is ever out of vocabulary.

    There is no pad token on purpose: a pad id would be masked out of the loss.
    """

    def __init__(self) -> None:
        super().__init__("bytes")

    def tokenize(self, text: str) -> list[int]:
        """Bytes of the text."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of the bytes; broken sequences become replacement characters, end of document is dropped."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    @property
    def vocab(self) -> dict[str, int]:
        """Names of the tokens."""
        return {**{f"<0x{i:02X}>": i for i in range(256)}, "<eod>": 256}

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Tokens by id."""
        return {i: name for name, i in self.vocab.items()}

    @property
    def vocab_size(self) -> int:
        """Number of tokens with the end of document."""
        return 257

    @property
    def eod(self) -> int:
        """End of document."""
        return 256


class NullTokenizer(MegatronTokenizer):
    """Text that already is a row of numbers; the end of document is the id `vocab_size`."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(None, vocab_size=vocab_size)
        self._numbers = int(vocab_size)

    def tokenize(self, text: str) -> list[int]:
        """Numbers of the text."""
        return [int(word) for word in text.split()]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The numbers as text."""
        return " ".join(map(str, ids))

    @property
    def vocab(self) -> dict[str, int]:
        """Numbers by their text."""
        return {str(i): i for i in range(self._numbers)}

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Text by number."""
        return {i: str(i) for i in range(self._numbers)}

    @property
    def vocab_size(self) -> int:
        """Number of tokens with the end of document."""
        return self._numbers + 1

    @property
    def eod(self) -> int:
        """End of document."""
        return self._numbers


class FileTokenizer(MegatronTokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        paths: files it was made from; part of the data set's cache key.
        encoder: `tokenizers.Tokenizer`.
        end: name of the token that ends a document.
    """

    def __init__(self, paths: Sequence[Path], encoder: Any, end: str) -> None:
        super().__init__(*map(str, paths))
        self._encoder = encoder
        self._end = encoder.token_to_id(end)
        if self._end is None:
            raise DataError(f"{paths[0]}: the end-of-document token {end!r} is not in the vocabulary")

    def tokenize(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return str(self._encoder.decode([int(i) for i in ids]))

    @property
    def vocab(self) -> dict[str, int]:
        """Ids by token."""
        return dict(self._encoder.get_vocab())

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Tokens by id."""
        return {i: token for token, i in self.vocab.items()}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._encoder.get_vocab_size())

    @property
    def eod(self) -> int:
        """End of document."""
        return int(self._end)


class SentencePieceTokenizer(MegatronTokenizer):
    """A SentencePiece model file."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        try:
            import sentencepiece
        except ModuleNotFoundError as error:
            raise DataError("--tokenizer-type SentencePieceTokenizer needs the package: pip install sentencepiece") from error
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def tokenize(self, text: str) -> list[int]:
        """Ids of the text."""
        return list(self._model.encode_as_ids(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return str(self._model.decode_ids([int(i) for i in ids]))

    @property
    def vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return {self._model.id_to_piece(i): i for i in range(self.vocab_size)}

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Pieces by id."""
        return {i: piece for piece, i in self.vocab.items()}

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._model.get_piece_size())

    @property
    def eod(self) -> int:
        """End of document: the model's end of sentence."""
        return int(self._model.eos_id())


def build_tokenizer(args: argparse.Namespace) -> MegatronTokenizer:
    """Make the tokenizer that the flags name.

    Raises:
        DataError: a file is missing or is not what its flag says.
    """
    if args.tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    if args.tokenizer_type == "NullTokenizer":
        return NullTokenizer(args.vocab_size)
    if args.tokenizer_type == "GPT2BPETokenizer":
        return _gpt2(_file(args.vocab_file, "--vocab-file"), _file(args.merge_file, "--merge-file"))
    if args.tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(_file(args.tokenizer_model, "--tokenizer-model"))
    return _from_file(args.tokenizer_model)


def _file(path: str | None, flag: str) -> Path:
    if path is None or not Path(path).is_file():
        raise DataError(f"{flag} {path}: there is no such file. Give the tokenizer's file.")
    return Path(path)


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise DataError("tokenizer files need the package: pip install tokenizers") from error
    return tokenizers


def _gpt2(vocabulary: Path, merges: Path) -> FileTokenizer:
    library = _library()
    try:
        model = library.models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{vocabulary}, {merges}: not a GPT-2 vocabulary and its merges ({error})") from error
    encoder = library.Tokenizer(model)
    encoder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = library.decoders.ByteLevel()
    return FileTokenizer([vocabulary, merges], encoder, "<|endoftext|>")


def _from_file(given: str | None) -> FileTokenizer:
    """Read `tokenizer.json`; the end token's name comes from the configuration beside it or from custom."""
    path = Path(given or "")
    if path.is_dir():
        path = path / "tokenizer.json"
    path = _file(str(path), "--tokenizer-model")
    try:
        encoder = _library().Tokenizer.from_file(str(path))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"--tokenizer-model {path}: not a file of the `tokenizers` library ({error})") from error
    named = _named_end(path.parent / "tokenizer_config.json")
    vocabulary = encoder.get_vocab()
    for end in filter(None, (named, *_END_NAMES)):
        if end in vocabulary:
            return FileTokenizer([path], encoder, end)
    raise DataError(
        f"--tokenizer-model {path}: no end-of-document token found. "
        f"Name it as eos_token in tokenizer_config.json, or add one of {', '.join(_END_NAMES)}."
    )


def _named_end(config: Path) -> str | None:
    if not config.is_file():
        return None
    token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def padded_vocab_size(tokens: int, divisor: int, tensor_parallel: int) -> int:
    """Smallest multiple of `divisor * tensor_parallel` that holds `tokens`."""
    unit = divisor * tensor_parallel
    return math.ceil(tokens / unit) * unit
