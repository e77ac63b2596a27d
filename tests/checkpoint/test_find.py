"""Which checkpoint is loaded when the tracker, or a directory, is not what it should be."""

from __future__ import annotations

import shutil

import pytest

from mindspeed.checkpoint import find_checkpoint
from mindspeed.checkpoint.manifest import NAME
from mindspeed.errors import CheckpointError
from tests.checkpoint._toy import run_save

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(params=["torch", "torch_dist"])
def root(request, tmp_path):
    for iteration in (2, 4):
        run_save(tmp_path / "save", iteration, request.param)
    return tmp_path / "save"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"garbage", "'garbage'"),
        (b"-4", "'-4'"),
        (b"0", "'0'"),
        (b"\xff\x00\x01", "instead of an iteration"),
        (b"4.0", "'4.0'"),
        (b"99", "names iteration 99"),
    ],
)
def test_bad_tracker_leads_to_the_newest_whole_checkpoint(root, content, words, caplog):
    (root / TRACKER).write_bytes(content)
    found = find_checkpoint(root, save=root)
    assert found.iteration == 4
    assert found.directory == root / "iter_0000004"
    assert words in found.warning
    assert [record.getMessage() for record in caplog.records] == [found.warning]
    assert "\n" not in found.warning


def test_missing_tracker(root):
    (root / TRACKER).unlink()
    assert find_checkpoint(root).iteration == 4


def test_tracker_with_line_end_is_fine(root):
    (root / TRACKER).write_text("2\n")
    found = find_checkpoint(root)
    assert (found.iteration, found.warning) == (2, "")


def test_unreadable_tracker(root):
    (root / TRACKER).unlink()
    (root / TRACKER).mkdir()
    assert "cannot be read" in find_checkpoint(root).warning


def test_half_written_directory_is_passed_over(root):
    """What plain Megatron leaves when it is killed: a directory with some files and a tracker that names an older one."""
    broken = root / "iter_0000006"
    shutil.copytree(root / "iter_0000004", broken)
    (broken / NAME).unlink()
    for path in list(broken.rglob("*.pt")) + list(broken.rglob("*.distcp")):
        path.write_bytes(path.read_bytes()[:100])
    assert find_checkpoint(root).iteration == 4  # not looked at
    (root / TRACKER).write_text("6")
    found = find_checkpoint(root)
    assert found.iteration == 4
    assert "iter_0000006" in found.warning


def test_nothing_whole_is_an_error(root):
    for directory in root.glob("iter_*"):
        for path in directory.rglob("*"):
            if path.is_file():
                path.unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint") as caught:
        find_checkpoint(root, save=root)
    assert "iter_0000004" in str(caught.value)
    assert "iter_0000002" in str(caught.value)


def test_step(root):
    assert find_checkpoint(root, step=2).iteration == 2
    with pytest.raises(CheckpointError, match="--ckpt-step 3") as caught:
        find_checkpoint(root, step=3)
    assert "4, 2" in str(caught.value)


def test_release(root):
    shutil.copytree(root / "iter_0000004", root / "release")
    (root / TRACKER).write_text("release")
    found = find_checkpoint(root)
    assert found.release
    assert found.iteration == 0
    assert found.directory == root / "release"


class TestDirectory:
    def test_no_load(self):
        assert find_checkpoint(None, save="x") is None

    def test_first_run_of_a_script_that_resumes_itself(self, tmp_path):
        assert find_checkpoint(tmp_path / "new", save=tmp_path / "new") is None
        (tmp_path / "new").mkdir()
        assert find_checkpoint(tmp_path / "new", save=f"{tmp_path}/./new/") is None

    @pytest.mark.parametrize("save", [None, "elsewhere"])
    def test_absent_directory(self, tmp_path, save):
        with pytest.raises(CheckpointError, match="does not exist.*--save"):
            find_checkpoint(tmp_path / "missing", save=save)

    def test_empty_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            find_checkpoint(tmp_path, save="elsewhere")

    def test_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="is not a directory"):
            find_checkpoint(tmp_path / "file", save=tmp_path / "file")

    def test_a_tracker_without_checkpoints_is_not_a_first_run(self, tmp_path):
        (tmp_path / TRACKER).write_text("100")
        with pytest.raises(CheckpointError, match="names iteration 100"):
            find_checkpoint(tmp_path, save=tmp_path)


def test_a_reader_finds_a_checkpoint_between_its_two_names(root):
    """Another job may load while a save is being renamed; it must not touch anything."""
    (root / "iter_0000004").rename(root / ".saving_0000004_00ff")
    names = sorted(path.name for path in root.iterdir())
    found = find_checkpoint(root)
    assert (found.iteration, found.directory.name, found.warning) == (4, ".saving_0000004_00ff", "")
    assert sorted(path.name for path in root.iterdir()) == names


def test_paths_with_spaces_and_other_letters(tmp_path):
    root = tmp_path / "my söves %d {x}"
    run_save(root, 2, "torch")
    assert find_checkpoint(str(root)).iteration == 2
