"""The feature: flags, manifests for hosts with a saver of their own, shapes, and the fence around pickles."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil

import pytest
import torch

from mindspeed.checkpoint import add_manifest, read_manifest, verify
from mindspeed.checkpoint.manifest import NAME
from mindspeed.core.checkpoint.verified_checkpoints import CheckpointFlags, VerifiedCheckpoints
from mindspeed.errors import CheckpointError
from mindspeed.host.events import Events
from mindspeed.patching.discovery import features_of
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.plan import Plan
from tests.checkpoint._toy import run_save


class PlainHost:
    """A host that saves and loads by its own code."""

    kind = "program"

    def __init__(self, **args):
        self.args = argparse.Namespace(**args)
        self.events = Events()


def subscribed(flags=None, **args):
    host = PlainHost(**args)
    VerifiedCheckpoints().subscribe(flags or CheckpointFlags(), host)
    return host


@pytest.fixture(params=["torch", "torch_dist"])
def plain_save(request, tmp_path):
    """(--save directory, checkpoint directory, format) of a checkpoint without manifest."""
    run_save(tmp_path, 2, request.param)
    (tmp_path / "iter_0000002" / NAME).unlink()
    return tmp_path, tmp_path / "iter_0000002", request.param


def test_feature_is_found_and_always_on():
    import mindspeed.core.checkpoint.verified_checkpoints as module

    (feature,) = features_of(module)
    assert (feature.name, feature.level) == ("verified-checkpoints", 0)
    assert [spec.option for spec in feature.specs] == ["--ckpt-verify", "--ckpt-trusted-load", "--ckpt-save-failure"]


@pytest.mark.parametrize("given", ["root", "checkpoint"])
def test_finished_checkpoint_gets_a_manifest(plain_save, given):
    root, directory, format = plain_save
    host = subscribed(ckpt_format=format, world_size=2, tensor_model_parallel_size=2, pipeline_model_parallel_size=None)
    host.events.fire("checkpoint_saved", iteration=2, directory=root if given == "root" else str(directory))
    manifest = verify(directory)
    assert (manifest.iteration, manifest.format) == (2, format)
    assert manifest.world == {"world_size": 2, "tensor_model_parallel_size": 2}
    assert not add_manifest(directory, 2)


def test_checkpoint_with_a_manifest_keeps_it(tmp_path):
    run_save(tmp_path, 2, "torch")
    before = read_manifest(tmp_path / "iter_0000002")
    subscribed().events.fire("checkpoint_saved", iteration=2, directory=tmp_path)
    assert read_manifest(tmp_path / "iter_0000002") == before


def test_what_is_not_saved_as_files_there_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").touch()
    subscribed().events.fire("checkpoint_saved", iteration=2, directory=tmp_path)
    subscribed().events.fire("checkpoint_saved", iteration=2, directory="msc://bucket/run")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_half_a_checkpoint_gets_none(plain_save):
    root, directory, format = plain_save
    victim = next(directory.rglob("*.pt"))
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="not saved whole"):
        subscribed(ckpt_format=format).events.fire("checkpoint_saved", iteration=2, directory=root)
    assert read_manifest(directory) is None


def test_off_means_off(plain_save):
    root, directory, format = plain_save
    host = subscribed(CheckpointFlags(ckpt_verify="off"), ckpt_format=format, num_layers=6)
    host.events.fire("checkpoint_saved", iteration=2, directory=root)
    assert read_manifest(directory) is None


class Evil:
    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_trusted_load_off_fences_in_every_unpickling(plain_save, tmp_path):
    _, directory, format = plain_save
    owned = tmp_path / "owned"
    feature, host, ledger = VerifiedCheckpoints(), PlainHost(), Ledger()
    assert list(feature.patches(CheckpointFlags(), host)) == []
    Plan.of(feature.patches(CheckpointFlags(ckpt_trusted_load="off"), host)).apply(ledger)
    try:
        good = next(directory.rglob("*.pt"))
        assert torch.load(good, weights_only=False)["iteration"] == 2
        torch.save({"args": Evil(owned)}, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match="mkdir"):
            torch.load(tmp_path / "bad.pt", weights_only=False)
        if format == "torch_dist":
            reader = torch.distributed.checkpoint.FileSystemReader(directory)
            assert reader.read_metadata().storage_data
            (directory / ".metadata").write_bytes(pickle.dumps(Evil(owned)))
            with pytest.raises(CheckpointError, match="mkdir"):
                reader.read_metadata()
        assert ledger.calls("torch:load") == 2
    finally:
        ledger.revert()
    assert not owned.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert owned.exists()
    shutil.rmtree(owned)
