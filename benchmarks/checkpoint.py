"""What safe checkpoints cost beside a bare `torch.save` that is made durable too."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks._case import Check, Paired, Run, case
from mindspeed.checkpoint import Save, verify
from mindspeed.checkpoint.files import fsync_directory, fsync_file

MIB = {"smoke": 64, "standard": 256, "full": 1024}


def _state(mebibytes: int) -> dict[str, torch.Tensor]:
    return {f"weight.{index}": torch.randn(1 << 18) for index in range(mebibytes)}


def _bare(root: Path, state: dict[str, torch.Tensor]) -> None:
    directory = root / "bare"
    directory.mkdir()
    torch.save(state, directory / "model_optim_rng.pt")
    fsync_file(directory / "model_optim_rng.pt")
    fsync_directory(directory)


def _ours(root: Path, state: dict[str, torch.Tensor]) -> None:
    with Save(root, 1, format="torch", world={"world_size": 1}) as save:
        directory = save.staged / "mp_rank_00"
        directory.mkdir()
        torch.save(state, directory / "model_optim_rng.pt")


def _seconds(write: Callable[[Path, dict[str, torch.Tensor]], None], state: dict[str, torch.Tensor], clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    root = Path(tempfile.mkdtemp(prefix="benchmark-"))
    os.sync()  # what earlier rounds left to write
    try:
        start = now()
        write(root, state)
        return now() - start
    finally:
        shutil.rmtree(root)


def _paired(run: Run, clock: str) -> Paired:
    state = _state(MIB[run.preset])
    root = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        _ours(root, state)
        kept = torch.load(root / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
        equal = verify(root / "iter_0000001") is not None and all(torch.equal(kept[name], state[name]) for name in state)
    finally:
        shutil.rmtree(root)
    return Paired(
        round=lambda: {"ours": _seconds(_ours, state, clock), "torch.save": _seconds(_bare, state, clock)},
        check=Check(0.0 if equal else 1.0, 0.0, "the checkpoint verifies and loads as it was saved"),
        workload={"MiB": MIB[run.preset], "format": "torch", "ranks": 1},
    )


@case(
    "checkpoint.save.wall", feature="verified-checkpoints", metric="ratio", against="torch.save", must=1 / 1.05, aim=1.0,
    unit="wall ms",
)  # fmt: skip
def save_wall(run: Run) -> Paired:
    """A save with checksums, manifest and atomic rename beside torch.save with fsync, elapsed time."""
    return _paired(run, "wall")


@case("checkpoint.save.cpu", feature="verified-checkpoints", metric="ratio", against="torch.save")
def save_cpu(run: Run) -> Paired:
    """The same in CPU time: what the checksums cost where the disk is not the limit."""
    return _paired(run, "cpu")
