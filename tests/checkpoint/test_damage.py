"""Damage of every kind is found before a weight is used, and named with file and rank."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from mindspeed.checkpoint import find_checkpoint, read_manifest, verify
from mindspeed.checkpoint.files import CHUNK, files_below
from mindspeed.checkpoint.manifest import NAME, entries_of
from mindspeed.errors import CheckpointError
from tests.checkpoint._toy import WORLD, run_save

FORMATS = ("torch", "torch_dist")
FLIPS = 200


@pytest.fixture(params=FORMATS)
def checkpoint(request, tmp_path):
    """Directory of iteration 4 of a --save directory with iterations 2 and 4."""
    for iteration in (2, 4):
        run_save(tmp_path / "save", iteration, request.param)
    return tmp_path / "save" / "iter_0000004"


def shards(directory):
    return [name for name in files_below(directory) if name.endswith((".distcp", "optim_rng.pt"))]


def refused(directory, *words, mode="full"):
    with pytest.raises(CheckpointError) as caught:
        verify(directory, mode)
    for word in words:
        assert word in str(caught.value)
    # The same through the front door, which also says how to go on; the older checkpoint is not taken silently.
    with pytest.raises(CheckpointError, match="--ckpt-step 2"):
        find_checkpoint(directory.parent, mode=mode)


def test_undamaged_checkpoint_passes_in_every_mode(checkpoint):
    for mode in ("full", "size"):
        manifest = verify(checkpoint, mode)
        assert (manifest.iteration, manifest.world) == (4, WORLD)
        assert set(manifest.files) == set(files_below(checkpoint)) - {NAME}
    assert verify(checkpoint, "off") is None


def test_every_flipped_bit_is_found(checkpoint):
    generator = random.Random(0)
    for name in files_below(checkpoint):
        path = checkpoint / name
        content = path.read_bytes()
        for _ in range(FLIPS):
            position, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
            changed = bytearray(content)
            changed[position] ^= bit
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match="manifest is damaged" if name == NAME else name.split("/")[-1]):
                verify(checkpoint)
        path.write_bytes(content)
    verify(checkpoint)


@pytest.mark.parametrize("kept", ["nothing", "head", "half", "all but one byte"])
@pytest.mark.parametrize("mode", ["full", "size"])
def test_truncation(checkpoint, kept, mode):
    for name in files_below(checkpoint):
        path = checkpoint / name
        content = path.read_bytes()
        length = {"nothing": 0, "head": 4, "half": len(content) // 2, "all but one byte": len(content) - 1}[kept]
        path.write_bytes(content[:length])
        refused(checkpoint, "manifest is damaged" if name == NAME else f"{name} ", mode=mode)
        path.write_bytes(content)


def test_missing_file_is_named_with_its_rank(checkpoint):
    for name in shards(checkpoint):
        saved = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        refused(checkpoint, name, "written by rank 0", "is missing", mode="size")
        (checkpoint / name).write_bytes(saved)


def test_extra_shard(checkpoint):
    extra = "__7_0.distcp" if (checkpoint / "common.pt").exists() else "mp_rank_07/model_optim_rng.pt"
    (checkpoint / extra).parent.mkdir(exist_ok=True)
    shutil.copy(checkpoint / shards(checkpoint)[0], checkpoint / extra)
    refused(checkpoint, extra, "rank 7", "does not belong", mode="size")


def test_a_users_note_is_no_damage(checkpoint):
    (checkpoint / "README.txt").write_text("the good one")
    verify(checkpoint)


def test_shard_of_another_iteration(checkpoint):
    name = shards(checkpoint)[0]
    shutil.copy(checkpoint.parent / "iter_0000002" / name, checkpoint / name)
    refused(checkpoint, name, "rank 0")


def test_directory_under_another_name(checkpoint):
    shutil.rmtree(checkpoint.parent / "iter_0000002")
    shutil.copytree(checkpoint, checkpoint.parent / "iter_0000002")
    with pytest.raises(CheckpointError, match="holds iteration 4"):
        verify(checkpoint.parent / "iter_0000002")


def test_swapped_ranks(tmp_path):
    run_save(tmp_path, 2, "torch")
    run_save(tmp_path, 4, "torch")
    directory = tmp_path / "iter_0000004"
    first, second = (directory / f"mp_rank_0{rank}" for rank in range(2))
    first.rename(directory / "other")
    second.rename(first)
    (directory / "other").rename(second)
    refused(directory, "mp_rank_00/model_optim_rng.pt", "tensor rank 0", "holds the content of mp_rank_01/model_optim_rng.pt")


def test_unreadable_file(checkpoint, monkeypatch):
    """Permissions do not stop an administrator, so the failure is injected."""
    import mindspeed.checkpoint.manifest as manifest

    def fails(path, index):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest, "chunk_checksum", fails)
    refused(checkpoint, "Permission denied", "errno 13")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_checksums_at_chunk_borders(tmp_path, size):
    import zlib

    content = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(content)
    expected = tuple(f"{zlib.crc32(content[start : start + CHUNK]):08x}" for start in range(0, size, CHUNK))
    entry = entries_of(tmp_path, ["f"])["f"]
    assert (entry.size, entry.sums) == (size, expected)


def test_damage_is_located(tmp_path):
    run_save(tmp_path, 2, "torch")
    from mindspeed.checkpoint import Save

    with Save(tmp_path, 3) as save:
        (save.staged / "mp_rank_00").mkdir()
        torch.save(torch.zeros(CHUNK // 2), save.wrote(save.staged / "mp_rank_00" / "model_optim_rng.pt"))
    path = tmp_path / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt"
    with open(path, "r+b") as stream:
        stream.seek(CHUNK + 1000)
        stream.write(b"\1")
    with pytest.raises(CheckpointError, match=f"between bytes {CHUNK} and"):
        verify(path.parent.parent)


class TestPlainMegatronCheckpoint:
    """No manifest: accepted after a look at its structure."""

    @pytest.fixture
    def plain(self, checkpoint):
        (checkpoint / NAME).unlink()
        return checkpoint

    def test_accepted(self, plain):
        assert read_manifest(plain) is None
        assert verify(plain) is None
        found = find_checkpoint(plain.parent)
        assert (found.iteration, found.warning) == (4, "")

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
    def test_cut_shards_are_found(self, plain, keep):
        for name in shards(plain):
            path = plain / name
            content = path.read_bytes()
            # The alignment padding behind the last tensor of a shard is not part of any tensor.
            path.write_bytes(content[: int(keep * len(content))])
            with pytest.raises(CheckpointError, match=name.split("/")[-1]):
                verify(plain)
            # Without a manifest this is what an interrupted save leaves, so the older one is taken.
            found = find_checkpoint(plain.parent)
            assert found.iteration == 2
            assert "iteration 4" in found.warning
            path.write_bytes(content)

    def test_zarr_has_no_list_of_tensors(self, plain):
        if (plain / ".metadata").exists():
            (plain / ".metadata").unlink()
            (plain / "metadata.json").write_text('{"sharded_backend": "zarr"}')
        assert verify(plain) is None

    def test_missing_rank_directory(self, plain):
        name = shards(plain)[0]
        (plain / name).unlink()
        with pytest.raises(CheckpointError, match="missing"):
            verify(plain)

    def test_pickle_in_the_metadata_cannot_run_code(self, plain, tmp_path):
        import os
        import pickle

        if not (plain / ".metadata").exists():
            (plain / ".metadata").touch()
            (plain / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "owned"),)

        (plain / ".metadata").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError, match="posix.mkdir"):
            verify(plain)
        assert not (tmp_path / "owned").exists()
