"""What can be said about a checkpoint without a manifest, as plain Megatron-LM writes them: its structure.

Missing and cut files are found; a flipped bit inside a tensor is not, since nothing recorded the content.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

from mindspeed.checkpoint.files import files_below
from mindspeed.checkpoint.restricted import RestrictedUnpickler

RANK_FILE = "model_optim_rng.pt"


def checkpoint_format(directory: Path) -> str | None:
    """ "torch_dist", "torch" or "torch_dcp" by the files present; None when it is none of them."""
    if (directory / "metadata.json").exists():
        return "torch_dist"
    if any(child.name.startswith("mp_rank_") for child in directory.iterdir()):
        return "torch"
    return "torch_dcp" if (directory / ".metadata").exists() else None


def structural_problems(directory: Path) -> list[str]:
    """What is missing or cut short, one sentence each."""
    if not directory.is_dir():
        return [f"{directory.name} is not a directory" if directory.exists() else f"{directory.name} does not exist"]
    kind = checkpoint_format(directory)
    if kind is None:
        return ["neither rank directories (mp_rank_*) nor the metadata of a distributed checkpoint are there"]
    problems = [text for name in files_below(directory) if name.endswith(".pt") for text in _archive(directory, name)]
    if kind == "torch":
        # Ranks that did not save the model keep an optimizer file alone, so only a wholly empty directory is wrong.
        folders = [child for child in sorted(directory.iterdir()) if child.name.startswith("mp_rank_") and child.is_dir()]
        problems += [f"{child.name}/{RANK_FILE} is missing" for child in folders if not (child / RANK_FILE).is_file()]
        return problems + _grid([child.name for child in folders])
    if kind == "torch_dist":
        backend, more = _sharded_config(directory)
        problems += more
        if backend != "torch_dist":
            return problems  # zarr keeps a directory for each tensor and no list of them
    return problems + _shards(directory)


def _archive(directory: Path, name: str) -> list[str]:
    """torch.save writes the table of contents at the end, so a cut file has none. Old pickles have another head."""
    path = directory / name
    try:
        with open(path, "rb") as stream:
            head = stream.read(4)
        if head[:2] == b"\x80\x02":
            return []
        if head == b"PK\x03\x04" and zipfile.is_zipfile(path):
            return []
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror} (errno {error.errno})"]
    return [f"{name} is empty or cut short ({path.stat().st_size} bytes)"]


def _grid(names: list[str]) -> list[str]:
    """Rank directories form a full grid of tensor x pipeline x expert ranks."""
    ranks = [
        tuple(int(part) for part in name.split("_")[2:]) for name in names if name[len("mp_rank_") :].replace("_", "").isdigit()
    ]
    if not ranks or len({len(rank) for rank in ranks}) > 1:
        return ["rank directories of different layouts are mixed"] if ranks else []
    sizes = [max(column) + 1 for column in zip(*ranks, strict=True)]
    expected = 1
    for size in sizes:
        expected *= size
    if len(set(ranks)) == expected:
        return []
    return [f"{expected - len(set(ranks))} of {expected} rank directories are missing (the highest is {max(names)})"]


def _sharded_config(directory: Path) -> tuple[str, list[str]]:
    """Storage backend of a distributed checkpoint, and what is wrong with its description."""
    problems, backend = [], ""
    try:
        backend = json.loads((directory / "metadata.json").read_text()).get("sharded_backend", "")
        if not backend:
            problems.append("metadata.json does not name a sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        problems.append(f"metadata.json cannot be read: {error}")
    if not (directory / "common.pt").is_file():
        problems.append("common.pt is missing")
    return backend or "torch_dist", problems


def _shards(directory: Path) -> list[str]:
    """Every shard that the metadata speaks of is there, up to its last recorded byte."""
    try:
        with open(directory / ".metadata", "rb") as stream:
            storage = RestrictedUnpickler(stream).load().storage_data
    except FileNotFoundError:
        return [".metadata is missing"]
    except (OSError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError, pickle.UnpicklingError) as error:
        return [f".metadata cannot be read: {error}"]
    ends: dict[str, int] = {}
    for item in storage.values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    problems = []
    for name, end in sorted(ends.items()):
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size < end:
            problems.append(f"{name} is cut short: {path.stat().st_size} bytes, and its last tensor ends at {end}")
    return problems
