"""The file-system shim: what is counted, and what each fault leaves behind."""

import builtins
import errno
import os
from pathlib import Path

import pytest
import torch

from mindspeed.testing import ranks
from mindspeed.testing.faults import KILL, SHORT_WRITE, FileCalls
from mindspeed.testing.pool import RankFailure, pools


def save(directory):
    """Nine calls: mkdir, open, three writes, fsync, replace, open (through os), unlink."""
    directory = Path(directory)
    (directory / "new").mkdir()
    with open(directory / "new" / "data.tmp", "wb", buffering=0) as stream:
        for chunk in (b"aaaa", b"bbbb", b"cccc"):
            view = memoryview(chunk)
            while view:
                view = view[stream.write(view) :]
        os.fsync(stream.fileno())
    os.replace(directory / "new" / "data.tmp", directory / "new" / "data")
    os.close(os.open(directory / "mark", os.O_CREAT | os.O_WRONLY))
    (directory / "mark").unlink()


def names(seen):
    return [call.partition(" ")[0] for call in seen.calls]


EXPECTED = ["mkdir", "open", "write", "write", "write", "fsync", "replace", "open", "unlink"]


def test_calls_are_counted_and_the_originals_come_back(tmp_path):
    before = builtins.open, os.open, os.replace
    with FileCalls() as seen:
        save(tmp_path)
    assert names(seen) == EXPECTED
    assert (tmp_path / "new" / "data").read_bytes() == b"aaaabbbbcccc"
    assert (builtins.open, os.open, os.replace) == before


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_every_call_can_fail(tmp_path, fault):
    for at in range(len(EXPECTED)):
        directory = tmp_path / str(at)
        directory.mkdir()
        with FileCalls(at=at, fault=fault) as seen, pytest.raises(OSError) as caught:
            save(directory)
        assert caught.value.errno == fault and len(seen.calls) == at + 1


def test_a_short_write_takes_half(tmp_path):
    with FileCalls(at=3, fault=SHORT_WRITE) as seen:
        save(tmp_path)
    assert names(seen).count("write") == 4, "the rest was written by another call"
    assert (tmp_path / "new" / "data").read_bytes() == b"aaaabbbbcccc"


def save_and_die(world, directory, at):
    with FileCalls(at=at, fault=KILL):
        save(directory)


def test_kill_leaves_what_was_written_before(tmp_path):
    with pytest.raises(RankFailure, match="the process ended"):
        pools().get(1).run(save_and_die, str(tmp_path), 4)
    assert (tmp_path / "new" / "data.tmp").read_bytes() == b"aaaabbbb"
    assert not (tmp_path / "new" / "data").exists()


@ranks(1)
def test_torch_save_to_a_python_file_is_seen(world):
    with FileCalls() as seen, open(world.shared_dir / "state", "wb") as stream:
        torch.save({"x": torch.arange(4)}, stream)
    assert names(seen)[0] == "open" and "write" in names(seen)
    assert torch.load(world.shared_dir / "state", weights_only=True)["x"].tolist() == [0, 1, 2, 3]
