"""Saves of several ranks, asynchronous saves, and failures that are not the file system's."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading

import pytest
import torch

from mindspeed.checkpoint import Save, Team, find_checkpoint, read_manifest, read_tracker, seal, verify
from mindspeed.checkpoint.errors import find_os_error, save_error
from mindspeed.checkpoint.manifest import share
from mindspeed.errors import CheckpointError
from tests.checkpoint._toy import remains, run_save


def on_ranks(size, work):
    """Run `work(team)` on `size` threads; returns results or exceptions in rank order."""
    slots, results = [None] * size, [None] * size
    barrier = threading.Barrier(size, timeout=20)

    def run(rank):
        def gather(item):
            slots[rank] = item
            barrier.wait()
            everything = list(slots)
            barrier.wait()
            return everything

        try:
            results[rank] = work(Team(rank, size, gather))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save_shard(save, rank):
    path = save.staged / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    path.parent.mkdir()
    torch.save({"rank": rank}, save.wrote(path))


def test_four_ranks_save_and_verify(tmp_path):
    def work(team):
        with Save(tmp_path, 2, team=team, world={"world_size": 4}) as save:
            save_shard(save, team.rank)
        return find_checkpoint(tmp_path, team=team)

    for found in on_ranks(4, work):
        assert found.manifest.world == {"world_size": 4}
        assert {name: entry.rank for name, entry in found.manifest.files.items()} == {
            f"mp_rank_{rank:02d}/model_optim_rng.pt": rank for rank in range(4)
        }


@pytest.mark.parametrize("bad", [0, 3])
def test_failure_of_one_rank_ends_the_save_on_all(tmp_path, bad):
    run_save(tmp_path, 2, "torch")

    def work(team):
        with Save(tmp_path, 4, team=team) as save:
            save_shard(save, team.rank)
            if team.rank == bad:
                raise OSError(errno.ENOSPC, "No space left on device", "/full/disk")

    for error in on_ranks(4, work):
        assert isinstance(error, CheckpointError)
        assert "/full/disk cannot be written: ENOSPC" in str(error)
    assert remains(tmp_path) == []
    assert find_checkpoint(tmp_path).iteration == 2


def test_damage_seen_by_one_rank_is_told_to_all(tmp_path):
    def save(team):
        with Save(tmp_path, 2, team=team) as save:
            save_shard(save, team.rank)

    on_ranks(2, save)
    path = tmp_path / "iter_0000002" / "mp_rank_01" / "model_optim_rng.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for error in on_ranks(2, lambda team: find_checkpoint(tmp_path, team=team)):
        assert isinstance(error, CheckpointError)
        assert "mp_rank_01/model_optim_rng.pt (written by rank 1; tensor rank 1) is damaged" in str(error)


def test_shares_cover_every_file_once():
    names = [f"__{rank}_{part}.distcp" for rank in range(4) for part in range(2)] + ["common.pt", "a", "b", "c"]
    for size in (1, 2, 3, 8):
        shares = [share(names, rank, size) for rank in range(size)]
        assert sorted(sum(shares, [])) == sorted(names)
    assert share(names, 2, 4)[:2] == ["__2_0.distcp", "__2_1.distcp"]


def test_programming_errors_pass_through_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Save(tmp_path, 2, keep_training=True) as save:
        save_shard(save, 0)
        raise ZeroDivisionError
    assert remains(tmp_path) == []
    assert not (tmp_path / "iter_0000002").exists()
    assert read_tracker(tmp_path)[0] is None


def test_full_disk_seen_by_torchs_own_writer(tmp_path):
    """torch.save to a path writes in C++ and loses the errno."""
    run_save(tmp_path, 2, "torch")
    with pytest.raises(CheckpointError, match=r"bytes free there.*was not saved.*Remedy"), Save(tmp_path, 4) as save:
        save_shard(save, 0)
        torch.save(torch.zeros(1 << 16), "/dev/full")
    assert find_checkpoint(tmp_path).iteration == 2


def test_save_without_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no rank wrote a file"), Save(tmp_path, 2):
        pass
    assert read_tracker(tmp_path)[0] is None


def test_redirect_leaves_other_paths_alone(tmp_path):
    save = Save(tmp_path, 2)
    save.begin()
    assert save.redirect(tmp_path / "iter_0000002" / "a" / "b") == str(save.staged / "a" / "b")
    assert save.redirect(str(tmp_path / "iter_0000002")) == str(save.staged)
    assert save.redirect("/elsewhere/x") == "/elsewhere/x"
    assert save.redirect(tmp_path / "latest_checkpointed_iteration.txt") == str(tmp_path / "latest_checkpointed_iteration.txt")
    save.abandon()


class TestAsynchronous:
    @staticmethod
    def writer(staged, dies):
        for rank in range(1):
            with open(os.path.join(staged, f"__{rank}_0.distcp"), "wb") as stream:
                stream.write(os.urandom(1000))
            if dies:
                os._exit(9)
            seal(staged, rank)

    def start(self, root, iteration, dies=False):
        save = Save(root, iteration, format="torch_dist")
        save.begin()
        (save.staged / "common.pt").write_bytes(b"common")
        process = multiprocessing.get_context("fork").Process(target=self.writer, args=(save.staged, dies))
        process.start()
        process.join()
        return save

    def test_writer_measures_and_the_commit_takes_it_over(self, tmp_path, monkeypatch):
        save = self.start(tmp_path, 2)
        measured = []
        import mindspeed.checkpoint.transaction as transaction

        original = transaction.entries_of
        monkeypatch.setattr(
            transaction, "entries_of", lambda d, names, **options: measured.extend(names) or original(d, names, **options)
        )
        save.commit(sealed=True)
        # The training process read nothing but the small common file.
        assert measured == ["common.pt"]
        manifest = read_manifest(tmp_path / "iter_0000002")
        assert set(manifest.files) == {"__0_0.distcp", "common.pt"}
        assert manifest.files["__0_0.distcp"].rank == 0
        assert verify(tmp_path / "iter_0000002") == manifest
        assert sorted(os.listdir(tmp_path / "iter_0000002")) == ["__0_0.distcp", "common.pt", "mindspeed_manifest.json"]

    def test_writer_that_died(self, tmp_path):
        self.start(tmp_path, 2).commit(sealed=True)
        save = self.start(tmp_path, 4, dies=True)
        with pytest.raises(CheckpointError, match="writer of rank 0 ended before"):
            save.commit(sealed=True)
        assert remains(tmp_path) == []
        assert read_tracker(tmp_path) == (2, "")

    def test_training_killed_while_the_writer_runs(self, tmp_path):
        run_save(tmp_path, 2, "torch")
        self.start(tmp_path, 4)  # never committed
        assert find_checkpoint(tmp_path).iteration == 2
        run_save(tmp_path, 6, "torch")
        assert remains(tmp_path) == []


def test_os_error_is_found_through_wrappers():
    class Wrapped(BaseException):
        def __init__(self, failures):
            self.failures = failures

    inner = OSError(errno.EDQUOT, "Disk quota exceeded", "/q")
    outer = RuntimeError("save failed")
    outer.__cause__ = Wrapped({1: (inner, None)})
    assert find_os_error(outer) is inner
    assert "EDQUOT" in str(save_error(outer, "/q", outcome="Nothing happened"))
    assert find_os_error(ValueError()) is None
