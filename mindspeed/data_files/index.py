"""The files of an indexed dataset, <prefix>.idx and <prefix>.bin, and every rule their structure has to obey.

Layout of the .idx, little-endian, S sequences, D document borders:

    0   9 bytes   b"MMIDIDX\\0\\0"
    9   uint64    version, 1
    17  uint8     code of the tokens' dtype
    18  uint64    S
    26  uint64    D
    34  int32[S]  tokens per sequence
    .   int64[S]  byte at which each sequence begins in the .bin
    .   int64[D]  index of the first sequence of each document, and S at the end
    .   int8[S]   modes, in multimodal data only

The host trusts these numbers. Sizes that do not fit then give wrong tokens or uninitialised memory, not errors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed.data_files.paths import FileStamp, readable_size
from mindspeed.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_BLOCK = 1 << 20  # elements checked at a time, so that a check needs a few MiB however large the index is


@dataclass(frozen=True)
class Index:
    """A checked index; the arrays are views of the mapped file.

    Attributes:
        prefix: path without .idx and .bin.
        dtype: of the tokens.
        lengths: int32[S], tokens per sequence.
        pointers: int64[S], byte offsets in the .bin.
        documents: int64[D], first sequence of each document, then S.
        stamps: of both files when they were checked.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray
    stamps: tuple[FileStamp, FileStamp]

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    @property
    def bin_path(self) -> Path:
        """The file with the tokens."""
        return Path(f"{self.prefix}.bin")

    def document_at(self, token: int) -> tuple[int, int]:
        """(document, sequence) that hold the token at a position of the whole file."""
        sequence = int(np.searchsorted(self.pointers, token * self.dtype.itemsize, side="right")) - 1
        return self.document_of(sequence), sequence

    def document_of(self, sequence: int) -> int:
        """Document that a sequence belongs to."""
        return int(np.searchsorted(self.documents, sequence, side="right")) - 1

    def check_unchanged(self) -> None:
        """Two system calls, for now and then during a run.

        Raises:
            DataError: a file was replaced or changed since it was checked.
        """
        for stamp in self.stamps:
            stamp.check()


def check_indexed_dataset(path_prefix: str, vocab_size: int | None = None) -> Index:
    """Open an indexed dataset and check its whole structure (about 0.1 s for 10 million sequences).

    Args:
        path_prefix: as given to --data-path.
        vocab_size: also look at every token (reads the whole .bin; see `check_vocab`).

    Raises:
        DataError: path, byte offset, rule and remedy.
    """
    idx, bin_ = Path(f"{path_prefix}.idx"), Path(f"{path_prefix}.bin")
    size = readable_size(idx)
    bin_size = readable_size(bin_)
    dtype, sequences, borders = _header(idx, size)
    content = np.memmap(idx, mode="r", dtype=np.uint8)
    arrays, at = [], HEADER.size
    for kind, count in ((np.int32, sequences), (np.int64, sequences), (np.int64, borders)):
        nbytes = count * np.dtype(kind).itemsize
        arrays.append(content[at : at + nbytes].view(kind))
        at += nbytes
    index = Index(str(path_prefix), dtype, *arrays, stamps=(FileStamp.of(idx), FileStamp.of(bin_)))
    _check_lengths(idx, index)
    _check_pointers(idx, index)
    _check_documents(idx, index)
    _check_bin(index, bin_size)
    if vocab_size is not None:
        from mindspeed.data_files.tokens import check_vocab

        check_vocab(index, vocab_size)
    return index


def _header(path: Path, size: int) -> tuple[np.dtype, int, int]:
    """Dtype, S and D, after comparing them with the size of the file."""
    if size < HEADER.size:
        what = "is empty" if size == 0 else f"ends at byte {size}, inside its header of {HEADER.size} bytes"
        raise _broken(path, what)
    with open(path, "rb") as stream:
        magic, version, code, sequences, borders = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC:
        raise _broken(path, f"byte 0: starts with {magic!r} instead of {MAGIC!r}, so it is not the index of a dataset")
    if version != VERSION:
        raise _broken(path, f"byte 9: has version {version}; known is {VERSION}")
    if code not in DTYPES:
        raise _broken(path, f"byte 17: has dtype code {code}; known are {min(DTYPES)} to {max(DTYPES)}")
    dtype = np.dtype(DTYPES[code])
    if dtype.kind == "f":
        raise _broken(path, f"byte 17: says that the tokens are {dtype.name}; tokens are integers")
    if sequences == 0 or borders == 0:
        raise _broken(
            path, f"byte 18: holds {sequences} sequences and {borders} document borders: there is nothing to train on"
        )
    expected = HEADER.size + 12 * sequences + 8 * borders
    # Multimodal data has a mode for each sequence behind the rest; readers of plain text ignore it.
    if size not in (expected, expected + sequences):
        state = "cut short" if size < expected else "longer than it should be, or its counts are wrong"
        raise _broken(
            path,
            f"byte 18: {sequences} sequences and {borders} document borders need {expected} bytes, there are {size}: {state}",
        )
    return dtype, sequences, borders


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _BLOCK):
        yield start, min(count, start + _BLOCK)


def _check_lengths(path: Path, index: Index) -> None:
    for start, stop in _blocks(len(index.lengths)):
        block = index.lengths[start:stop]
        if block.min() < 0:
            bad = start + int(np.argmax(block < 0))
            raise _broken(path, f"byte {HEADER.size + 4 * bad}: sequence {bad} has the length {index.lengths[bad]}")


def _check_pointers(path: Path, index: Index) -> None:
    """Each sequence begins where the one before it ends, and the first at 0."""
    base = HEADER.size + 4 * len(index.lengths)
    if index.pointers[0] != 0:
        raise _broken(path, f"byte {base}: the first sequence begins at byte {index.pointers[0]} of the .bin instead of 0")
    for start, stop in _blocks(len(index.pointers) - 1):
        ends = index.pointers[start:stop] + index.lengths[start:stop].astype(np.int64) * index.dtype.itemsize
        following = index.pointers[start + 1 : stop + 1]
        if not np.array_equal(ends, following):
            first = int(np.argmax(ends != following))
            bad = start + first + 1
            raise _broken(
                path,
                f"byte {base + 8 * bad}: sequence {bad} begins at byte {following[first]} of the .bin, "
                f"but the one before it ends at {ends[first]}",
            )


def _check_documents(path: Path, index: Index) -> None:
    """Borders rise from 0 to S."""
    base, borders, count = HEADER.size + 12 * len(index.lengths), index.documents, len(index.lengths)
    if borders[0] != 0:
        raise _broken(path, f"byte {base}: the first document begins with sequence {borders[0]} instead of 0")
    for start, stop in _blocks(len(borders) - 1):
        if (falls := borders[start + 1 : stop + 1] < borders[start:stop]).any():
            bad = start + int(np.argmax(falls)) + 1
            raise _broken(
                path,
                f"byte {base + 8 * bad}: document {bad} begins with sequence {borders[bad]}, before the one in front of it",
            )
    if borders[-1] != count:
        at = base + 8 * (len(borders) - 1)
        raise _broken(path, f"byte {at}: the documents end with sequence {borders[-1]}, but there are {count} sequences")


def _check_bin(index: Index, size: int) -> None:
    expected = index.tokens * index.dtype.itemsize
    if size == expected:
        return
    state = "is empty" if size == 0 and expected else "is cut short" if size < expected else "is longer than its index says"
    raise DataError(
        f"{index.bin_path} {state}: byte {min(size, expected)}: it has {size} bytes, and {index.prefix}.idx describes {expected}. "
        "The two files are not of one piece: copy both again, or run the preprocessing again."
    )


def _broken(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}. Copy the .idx and the .bin again, or run the preprocessing again.")
