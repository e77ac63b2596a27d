"""Indexed datasets of the host's builder, damaged in every way that their structure can show."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed.data_files import check_indexed_dataset
from mindspeed.data_files.index import HEADER, MAGIC
from mindspeed.errors import DataError
from tests.data_files._build import SMALL, build

LENGTHS, SEQUENCES, BORDERS = HEADER.size, 5, 5
POINTERS = LENGTHS + 4 * SEQUENCES
DOCUMENTS = POINTERS + 8 * SEQUENCES
END = DOCUMENTS + 8 * BORDERS


@pytest.fixture
def prefix(tmp_path):
    return build(tmp_path / "small", SMALL)


def write_at(path, offset, content):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def refused(prefix, *words):
    with pytest.raises(DataError) as caught:
        check_indexed_dataset(prefix)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_what_the_builder_makes_is_accepted(tmp_path, dtype):
    index = check_indexed_dataset(build(tmp_path / "data", SMALL, dtype), vocab_size=11)
    assert index.dtype == dtype
    assert index.lengths.tolist() == [3, 2, 1, 0, 4]
    assert index.documents.tolist() == [0, 2, 3, 4, 5]
    assert index.tokens == 10
    assert [index.document_at(token) for token in range(10)] == [(0, 0)] * 3 + [(0, 1)] * 2 + [(1, 2)] + [(3, 4)] * 4
    index.check_unchanged()


def test_multimodal_data_has_one_more_part(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "mm.bin"), dtype=np.int32, multimodal=True)
    builder.add_item(torch.arange(4), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "mm.idx"))
    assert check_indexed_dataset(str(tmp_path / "mm")).tokens == 4


@given(length=st.integers(0, END - 1))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_index_cut_anywhere(prefix, length):
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    assert len(content) == END
    try:
        path.write_bytes(content[:length])
        refused(prefix, f"{prefix}.idx", "is empty" if length == 0 else "byte")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("length", [0, 1, 9, 17, 18, 26, 34, POINTERS, DOCUMENTS, DOCUMENTS + 8, END - 1])
def test_index_cut_at_each_border(prefix, length):
    os.truncate(f"{prefix}.idx", length)
    refused(prefix, f"{prefix}.idx")


# Bits outside of the document borders are each found; a border may move to another place that is as valid.
@given(position=st.integers(0, DOCUMENTS - 1), bit=st.integers(0, 7))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_of_header_lengths_and_pointers(prefix, position, bit):
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    try:
        path.write_bytes(changed)
        # uint16 (8) and int16 (3) differ in three bits, so that no single flip makes one of the other.
        refused(prefix, prefix)
    finally:
        path.write_bytes(content)


@given(position=st.integers(DOCUMENTS, END - 1), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bits_of_borders_that_break_the_order(prefix, position, bit):
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    borders = np.frombuffer(bytes(changed), np.int64, offset=DOCUMENTS)
    is_valid = borders[0] == 0 and borders[-1] == SEQUENCES and bool((np.diff(borders) >= 0).all())
    try:
        path.write_bytes(changed)
        if is_valid:
            check_indexed_dataset(prefix)
        else:
            refused(prefix, "document")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "content", "words"),
    [
        (0, b"NOTIDX\0\0\0", ("byte 0", "b'NOTIDX")),
        (9, struct.pack("<Q", 2), ("byte 9", "version 2")),
        (17, b"\x00", ("byte 17", "dtype code 0")),
        (17, b"\x63", ("byte 17", "dtype code 99")),
        (17, b"\x07", ("byte 17", "float32")),
        (18, struct.pack("<Q", 2**63), ("byte 18", "cut short")),
        (18, struct.pack("<QQ", 0, 1), ("byte 18", "0 sequences")),
        (LENGTHS + 4, struct.pack("<i", -2), (f"byte {LENGTHS + 4}", "sequence 1 has the length -2")),
        (POINTERS, struct.pack("<q", 2), (f"byte {POINTERS}", "instead of 0")),
        (POINTERS + 16, struct.pack("<q", 2), (f"byte {POINTERS + 16}", "sequence 2 begins at byte 2", "ends at 10")),
        (POINTERS + 16, struct.pack("<q", -1), (f"byte {POINTERS + 16}",)),
        (DOCUMENTS, struct.pack("<q", 1), (f"byte {DOCUMENTS}", "instead of 0")),
        (DOCUMENTS + 16, struct.pack("<q", 1), (f"byte {DOCUMENTS + 16}", "document 2")),
        (DOCUMENTS + 16, struct.pack("<q", 2**40), (f"byte {DOCUMENTS + 24}", "document 3")),
        (END - 8, struct.pack("<q", 4), (f"byte {END - 8}", "end with sequence 4", "5 sequences")),
        (END, b"\0", ("byte 18", "longer")),
    ],
)
def test_each_rule_names_its_place(prefix, offset, content, words):
    write_at(f"{prefix}.idx", offset, content)
    refused(prefix, f"{prefix}.idx", "preprocessing again", *words)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "is empty"), (1, "cut short"), (19, "cut short"), (21, "longer"), (40, "longer")]
)
def test_bin_of_another_size(prefix, size, words):
    os.truncate(f"{prefix}.bin", size)
    refused(prefix, f"{prefix}.bin", words, "describes 20")


def test_index_of_another_bin(tmp_path, prefix):
    other = build(tmp_path / "other", [[[1] * 50]])
    os.replace(f"{other}.bin", f"{prefix}.bin")
    refused(prefix, "not of one piece")


class TestNoFile:
    def test_missing(self, tmp_path):
        refused(str(tmp_path / "none"), "none.idx does not exist", "<prefix>.bin")

    def test_prefix_with_its_ending(self, prefix):
        refused(f"{prefix}.bin", f"without its ending: {prefix}.")

    def test_missing_bin(self, prefix):
        os.unlink(f"{prefix}.bin")
        refused(prefix, f"{prefix}.bin does not exist")

    @pytest.mark.parametrize("ending", ["idx", "bin"])
    def test_directory(self, prefix, ending):
        os.unlink(f"{prefix}.{ending}")
        os.mkdir(f"{prefix}.{ending}")
        refused(prefix, f"{prefix}.{ending} is a directory")

    @pytest.mark.parametrize("ending", ["idx", "bin"])
    def test_dangling_link(self, prefix, ending):
        os.unlink(f"{prefix}.{ending}")
        os.symlink("/nowhere/else", f"{prefix}.{ending}")
        refused(prefix, f"{prefix}.{ending} is a link to /nowhere/else")

    def test_pipe(self, prefix):
        os.unlink(f"{prefix}.bin")
        os.mkfifo(f"{prefix}.bin")
        refused(prefix, "not a regular file")

    def test_unreadable(self, prefix, monkeypatch):
        """Permissions do not stop an administrator, so the failure is injected."""
        import builtins

        def closed(path, *args, original=open, **options):
            if str(path).endswith(".bin"):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **options)

        monkeypatch.setattr(builtins, "open", closed)
        refused(prefix, f"{prefix}.bin cannot be read", "errno 13")

    def test_name_too_long(self, tmp_path):
        refused(str(tmp_path / ("x" * 300)), "cannot be reached", "errno")


@pytest.mark.parametrize("ending", ["idx", "bin"])
def test_replaced_while_running(prefix, ending):
    index = check_indexed_dataset(prefix)
    path = Path(f"{prefix}.{ending}")
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)
    with pytest.raises(DataError, match=f"{ending} was replaced or changed"):
        index.check_unchanged()
    path.unlink()
    with pytest.raises(DataError, match="unreachable"):
        index.check_unchanged()


def test_ten_million_documents_in_a_second(tmp_path):
    """CPU seconds, so that a busy machine does not matter."""
    count = 10_000_000
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 3, count, dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(tmp_path / "big.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 1, count, count + 1))
        for array in (lengths, ends - lengths, np.arange(count + 1, dtype=np.int64)):
            array.tofile(stream)
    with open(tmp_path / "big.bin", "wb") as stream:
        stream.truncate(int(ends[-1]))
    start = time.process_time()
    index = check_indexed_dataset(str(tmp_path / "big"))
    assert time.process_time() - start < 1.0
    assert index.tokens == ends[-1]
    assert index.document_at(int(ends[-1]) - 1)[0] == int(np.flatnonzero(lengths)[-1])
