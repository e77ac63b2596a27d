"""A trainer of two model-parallel ranks in one process, whose state is a few small tensors."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from mindspeed.checkpoint import Found, Save

WORLD = {"world_size": 2, "tensor_model_parallel_size": 2}


def state_of(iteration: int, rank: int = 0, salt: int = 0) -> dict:
    generator = torch.Generator().manual_seed(1000 * iteration + 10 * salt + rank)
    weights = {f"layer{index}": torch.randn(64, 8, generator=generator) for index in range(3)}
    return {"args": argparse.Namespace(num_layers=3, salt=salt), "iteration": iteration, "model": weights}


def write(save_: Save, format: str, salt: int = 0) -> None:
    {"torch": _write_torch, "torch_dist": _write_torch_dist}[format](save_, salt)


def _write_torch(save_: Save, salt: int) -> None:
    for rank in range(2):
        path = Path(save_.redirect(save_.final / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"))
        path.parent.mkdir(parents=True)
        # A Python file object, so that the writes can be counted.
        with open(save_.wrote(path), "wb") as stream:
            torch.save(state_of(save_.iteration, rank, salt), stream)


def _write_torch_dist(save_: Save, salt: int) -> None:
    """The files of a distributed checkpoint, by torch's own writer as the host uses it."""
    state = state_of(save_.iteration, 0, salt)
    directory = Path(save_.redirect(save_.final))
    save(state.pop("model"), storage_writer=FileSystemWriter(directory), no_dist=True)
    with open(directory / "common.pt", "wb") as stream:
        torch.save(state, stream)
    with open(directory / "metadata.json", "w") as stream:
        json.dump({"sharded_backend": "torch_dist", "sharded_backend_version": 1}, stream)


def run_save(root: Path, iteration: int, format: str, salt: int = 0, **options) -> Save:
    save_ = Save(root, iteration, format=format, world=WORLD, **options)
    with save_:
        write(save_, format, salt)
    return save_


def loaded(found: Found, format: str) -> dict:
    """The state of rank 0."""
    if format == "torch":
        return torch.load(found.directory / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    from torch.distributed.checkpoint import load

    state = torch.load(found.directory / "common.pt", weights_only=False)
    state["model"] = {name: torch.zeros(64, 8) for name in state_of(1)["model"]}
    load(state["model"], checkpoint_id=str(found.directory), no_dist=True)
    return state


def fingerprint(state: dict) -> bytes:
    buffer = io.BytesIO()
    for name, weight in sorted(state["model"].items()):
        buffer.write(name.encode() + weight.numpy().tobytes())
    return buffer.getvalue()


def remains(root: Path) -> list[str]:
    """Names that only a save under way may have."""
    return sorted(child.name for child in root.iterdir() if child.name.startswith((".saving", ".replaced", ".latest")))
