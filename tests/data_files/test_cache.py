"""The cache of sample indices: not writable, full, or half written by a job that was killed."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from mindspeed.data_files import cache_failures, check_cache, mend_cache
from mindspeed.errors import DataError
from mindspeed.testing.faults import FileCalls


def test_good_directory_is_made_and_left_empty(tmp_path):
    check_cache(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_file_in_its_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"--data-cache-path .*file.*EEXIST"):
        check_cache(tmp_path / "file")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "name a directory that can be written"), (errno.EACCES, "can be written"), (errno.ENOSPC, "free space")],
)
def test_failing_file_system(tmp_path, number, words):
    with pytest.raises(DataError, match=f"{errno.errorcode[number]}.*{words}"), FileCalls(at=0, fault=number):
        check_cache(tmp_path / "new")


def test_full_device_while_building():
    with pytest.raises(DataError, match="ENOSPC.*free space there"), cache_failures("/cache"):
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")


def sets(directory):
    for name in ("one", "two"):
        for part in ("document_index", "sample_index", "shuffle_index"):
            np.save(directory / f"{name}-GPTDataset-train-{part}.npy", np.arange(100, dtype=np.int32).reshape(50, 2))
        (directory / f"{name}-GPTDataset-train-description.txt").write_text("{}")
    (directory / "users-own.npy").write_bytes(b"not ours to judge")


@pytest.mark.parametrize("kept", [0, 5, 60, 128, 300, -1])
def test_half_written_set_is_removed_as_a_whole(tmp_path, kept):
    sets(tmp_path)
    path = tmp_path / "one-GPTDataset-train-sample_index.npy"
    path.write_bytes(path.read_bytes()[:kept])
    before = set(os.listdir(tmp_path))
    removed = mend_cache(tmp_path)
    assert {file.name for file in removed} == {name for name in before if name.startswith("one-")}
    assert set(os.listdir(tmp_path)) == {name for name in before if not name.startswith("one-")}
    assert mend_cache(tmp_path) == []


def test_whole_cache_is_left_alone(tmp_path):
    sets(tmp_path)
    assert mend_cache(tmp_path) == []
    assert mend_cache(tmp_path / "missing") == []


def test_what_the_host_builds_is_whole(tmp_path):
    from tests.data_files._build import build
    from tests.data_files.test_tokens import gpt_dataset

    gpt_dataset(build(tmp_path / "data", [[list(range(30))]] * 4), tmp_path)
    names = os.listdir(tmp_path / "cache")
    assert len([name for name in names if name.endswith(".npy")]) == 3
    assert mend_cache(tmp_path / "cache") == []
