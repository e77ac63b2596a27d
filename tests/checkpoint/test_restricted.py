"""--ckpt-trusted-load off: what a checkpoint needs is admitted, everything else is named and refused."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import os
import pathlib
import pickle
import random
import subprocess

import numpy
import pytest
import torch

from mindspeed.checkpoint import load_restricted, restricted_load
from mindspeed.errors import CheckpointError


def through_file(content, tmp_path, **options):
    torch.save(content, tmp_path / "state.pt", **options)
    return load_restricted(tmp_path / "state.pt", map_location="cpu")


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_everything_a_megatron_checkpoint_holds(tmp_path, old_format):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.enums import AttnBackend

    config = DistributedDataParallelConfig(bucket_size=8)
    state = {
        "args": argparse.Namespace(num_layers=2, backend=AttnBackend.auto, dtype=torch.bfloat16, path=pathlib.Path("/x")),
        "config": config,
        "model": collections.OrderedDict(w=torch.randn(3, 4), b=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))),
        "int": torch.arange(3, dtype=torch.uint8),
        "shape": torch.Size([3]),
        "rng_state": [{"random": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}],
        "scalar": numpy.float64(1.5),
        "flag": numpy.bool_(True),
        "array": numpy.arange(6, dtype=numpy.int32).reshape(2, 3),
        "extra": io.BytesIO(b"fp8"),
        "sets": {1, 2},
        "slice": slice(1, 2),
    }
    back = through_file(state, tmp_path, _use_new_zipfile_serialization=not old_format)
    assert back["args"] == state["args"]
    assert back["config"] == config
    assert torch.equal(back["model"]["w"], state["model"]["w"])
    assert isinstance(back["model"]["b"], torch.nn.Parameter)
    assert numpy.array_equal(back["array"], state["array"])
    assert back["scalar"] == 1.5
    assert back["extra"].read() == b"fp8"
    assert back["sets"] == {1, 2}
    assert back["rng_state"][0]["random"] == random.getstate()


class Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Call(os.system, "true"), "system"),
        (Call(subprocess.Popen, ["true"]), "subprocess.Popen"),
        (Call(eval, "1"), "eval"),
        (Call(getattr, 1, "real"), "getattr"),
        (Call(torch.hub.load, "x", "y"), "torch.hub.load"),
        (Call(torch.load, "x"), "torch.serialization.load"),
        (Call(numpy.load, "x"), "load"),
        (Colour.RED, "Colour"),
    ],
)
def test_others_are_refused_by_name(tmp_path, content, name):
    with pytest.raises(CheckpointError, match=f"{name}.*--ckpt-trusted-load on"):
        through_file({"args": content}, tmp_path)


def test_pickle_inside_an_old_storage_stays_fenced(tmp_path):
    """A storage pickled by itself carries a file of its own, which torch would load without limits."""
    inner = io.BytesIO()
    torch.save({"x": Call(os.mkdir, str(tmp_path / "owned"))}, inner)
    with pytest.raises(CheckpointError, match="mkdir"):
        through_file(Call(torch.storage._load_from_bytes, inner.getvalue()), tmp_path)
    assert not (tmp_path / "owned").exists()


def test_dotted_names_do_not_reach_through_an_admitted_module(tmp_path):
    from mindspeed.checkpoint.restricted import RestrictedUnpickler

    text = b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93."
    with pytest.raises(CheckpointError, match="torch.os.system"):
        RestrictedUnpickler(io.BytesIO(text)).load()
    assert RestrictedUnpickler(io.BytesIO(pickle.dumps({"a": 1}))).load() == {"a": 1}


def test_advice_fences_only_unlimited_loads(tmp_path):
    torch.save({"x": Call(os.mkdir, str(tmp_path / "owned"))}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="mkdir"):
        restricted_load(torch.load, tmp_path / "bad.pt", weights_only=False)
    torch.save({"x": torch.ones(2)}, tmp_path / "good.pt")
    assert torch.equal(restricted_load(torch.load, tmp_path / "good.pt", weights_only=True)["x"], torch.ones(2))
    assert torch.equal(restricted_load(torch.load, tmp_path / "good.pt", weights_only=False)["x"], torch.ones(2))
    assert not (tmp_path / "owned").exists()
