"""The manifest of a checkpoint: which files belong to it, their sizes and checksums, who wrote them, for which run.

It is a JSON file inside the iteration's directory, written last, so its presence says that the checkpoint is
complete. Megatron-LM and torch.distributed.checkpoint open files by name and never meet it. The first line
holds the checksum of the rest, so damage to the manifest itself is found as well.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed.checkpoint.files import CHUNK, chunk_checksum, chunk_count, files_below, fsync_file
from mindspeed.checkpoint.structure import structural_problems
from mindspeed.errors import CheckpointError

NAME = "mindspeed_manifest.json"
VERSION = 1
MODES = ("full", "size", "off")

# Files that a loader would read if they lay in the directory; others, such as notes of a user, do no harm.
_LOADED = re.compile(r"(\.distcp|\.pt|\.ema|(^|/)\.metadata|(^|/)metadata\.json)$")
_SHARD = re.compile(r"__(\d+)_\d+\.distcp$")
_MODEL_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d{3}))?(?:_(\d{3}))?/")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: `rank` wrote it (None: not told); `sums` has one CRC-32 for each 16 MiB."""

    size: int
    sums: tuple[str, ...]
    rank: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of.

    Attributes:
        iteration: training step after which it was taken.
        format: "torch" or "torch_dist".
        world: sizes of the job, e.g. {"world_size": 8, "tensor_model_parallel_size": 2}.
        files: relative name -> entry.
    """

    iteration: int
    format: str
    world: Mapping[str, int]
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's content: a line with the checksum of the body, then the body."""
        files = {name: [entry.size, entry.rank, list(entry.sums)] for name, entry in sorted(self.files.items())}
        body: dict[str, Any] = {"iteration": self.iteration, "format": self.format, "world": dict(self.world), "files": files}
        text = json.dumps(body, indent=0, separators=(",", ":")).encode()
        return _head(text) + text

    @staticmethod
    def from_bytes(content: bytes, path: Path) -> Manifest:
        """Read what `to_bytes` wrote.

        Raises:
            CheckpointError: the content is not exactly what was written.
        """
        head, newline, text = content.partition(b"\n")
        if head + newline != _head(text):
            raise CheckpointError(f"{path}: the manifest is damaged: its checksum does not match its content")
        body = json.loads(text)
        files = {name: FileEntry(size, tuple(sums), rank) for name, (size, rank, sums) in body["files"].items()}
        return Manifest(body["iteration"], body["format"], body["world"], files)


def _head(text: bytes) -> bytes:
    return json.dumps({"mindspeed_manifest": VERSION, "chunk": CHUNK, "crc32": f"{zlib.crc32(text):08x}"}).encode() + b"\n"


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a checkpoint directory; None where there is none (a plain Megatron checkpoint).

    Raises:
        CheckpointError: it is damaged or cannot be read.
    """
    path = directory / NAME
    try:
        return Manifest.from_bytes(path.read_bytes(), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror} (errno {error.errno})") from error


def writer_of(name: str, declared: Mapping[str, int] | None = None) -> int | None:
    """Rank that wrote a file: as declared, else as its name tells, else None."""
    if declared and name in declared:
        return declared[name]
    if shard := _SHARD.search(name):
        return int(shard.group(1))
    if "/" not in name and name in ("common.pt", "metadata.json", ".metadata"):
        return 0
    return None


def share(names: Iterable[str], rank: int, size: int, declared: Mapping[str, int] | None = None) -> list[str]:
    """The files whose checksums `rank` of `size` computes: its own ones, and a fair part of those of nobody.

    A file is best read where it was written, since it still lies in that machine's memory.
    """
    mine = []
    for index, name in enumerate(names):
        writer = writer_of(name, declared)
        if (index if writer is None else writer) % size == rank:
            mine.append(name)
    return mine


def entries_of(
    directory: Path, names: Iterable[str], *, declared: Mapping[str, int] | None = None, durable: bool = False
) -> dict[str, FileEntry]:
    """Measure files, several chunks at a time (file reads and CRC-32 run outside the interpreter lock); optionally fsync."""

    def make_durable() -> None:
        for name in names if durable else ():
            fsync_file(directory / name)

    names = list(names)
    # The disk works while the checksums are taken from memory, so the slower of the two is all that is waited for.
    with ThreadPoolExecutor(1) as background, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        written = background.submit(make_durable)
        sizes = {name: (directory / name).stat().st_size for name in names}
        chunks = [(name, index) for name, size in sizes.items() for index in range(chunk_count(size))]
        sums: dict[str, list[str]] = {name: [] for name in names}
        for (name, _), crc in zip(
            chunks, pool.map(lambda chunk: chunk_checksum(directory / chunk[0], chunk[1]), chunks), strict=True
        ):
            sums[name].append(crc)
        written.result()
    return {name: FileEntry(sizes[name], tuple(sums[name]), writer_of(name, declared)) for name in names}


def differences(directory: Path, manifest: Manifest, mode: str, *, rank: int = 0, size: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, one sentence each, naming file and writer.

    Missing, extra and wrongly sized files are looked for by rank 0; mode "full" also compares the checksums
    of this rank's share of the files.
    """
    try:
        present = set(files_below(directory))
    except OSError as error:
        return [f"{directory} cannot be read: {error.strerror} (errno {error.errno})"]
    problems = _structural(directory, manifest, present) if rank == 0 else []
    if mode == "full":
        declared = {name: entry.rank for name, entry in manifest.files.items() if entry.rank is not None}
        names = [name for name in share(sorted(manifest.files), rank, size, declared) if name in present]
        # A file of another size is reported already, and reading it would say nothing more.
        names = [name for name in names if (directory / name).stat().st_size == manifest.files[name].size]
        problems += _contents(directory, manifest, names)
    return problems


def _structural(directory: Path, manifest: Manifest, present: set[str]) -> list[str]:
    problems = []
    for name, entry in manifest.files.items():
        if name not in present:
            problems.append(f"{name}{_by(name, entry)} is missing")
        elif (found := (directory / name).stat().st_size) != entry.size:
            kind = "is cut short" if found < entry.size else "is too long"
            problems.append(f"{name}{_by(name, entry)} {kind}: {found} bytes instead of {entry.size}")
    for name in sorted(present - set(manifest.files)):
        if _LOADED.search(name):
            problems.append(f"{name}{_by(name, None)} does not belong to this checkpoint")
    return problems


def _contents(directory: Path, manifest: Manifest, names: list[str]) -> list[str]:
    try:
        found = entries_of(directory, names)
    except OSError as error:
        return [f"{error.filename or directory} cannot be read: {error.strerror} (errno {error.errno})"]
    owners = {(entry.size, entry.sums): name for name, entry in manifest.files.items()}
    problems = []
    for name, seen in found.items():
        wanted = manifest.files[name]
        if seen.sums == wanted.sums:
            continue
        if other := owners.get((seen.size, seen.sums)):
            problems.append(f"{name}{_by(name, wanted)} holds the content of {other}{_by(other, manifest.files[other])}")
            continue
        bad = [index for index, (a, b) in enumerate(zip(seen.sums, wanted.sums, strict=True)) if a != b]
        where = f"between bytes {bad[0] * CHUNK} and {min(seen.size, (bad[0] + 1) * CHUNK)}"
        problems.append(f"{name}{_by(name, wanted)} is damaged {where}: its checksum differs from the one taken at the save")
    return problems


def _by(name: str, entry: FileEntry | None) -> str:
    """The rank behind a file, in words."""
    parts = []
    rank = entry.rank if entry is not None and entry.rank is not None else writer_of(name)
    if rank is not None:
        parts.append(f"written by rank {rank}")
    if model := _MODEL_RANK.match(name):
        tensor, *others = (int(part) for part in model.groups() if part is not None)
        parts.append(f"tensor rank {tensor}" + (f", pipeline or expert rank {'/'.join(map(str, others))}" if others else ""))
    return f" ({'; '.join(parts)})" if parts else ""


def verify(directory: Path, mode: str = "full", *, rank: int = 0, size: int = 1) -> Manifest | None:
    """Check one checkpoint directory against its manifest, before any weight is used.

    Args:
        mode: "full" compares sizes and checksums, "size" names and sizes, "off" nothing.
        rank, size: this rank reads its share of the files only; combine with `Team.together`.

    Returns:
        The manifest, or None for a plain Megatron checkpoint, whose structure alone can be checked.

    Raises:
        CheckpointError: every problem found, with file and rank.
    """
    if mode not in MODES:
        raise ValueError(f"--ckpt-verify {mode}: must be one of {', '.join(MODES)}")
    if mode == "off":
        return None
    manifest = read_manifest(directory)
    if manifest is None:
        problems = structural_problems(directory) if rank == 0 else []
    else:
        problems = differences(directory, manifest, mode, rank=rank, size=size)
        named = re.fullmatch(r"iter_(\d{7,})", directory.name)
        if named and int(named.group(1)) != manifest.iteration:
            problems.insert(0, f"the directory is named {directory.name} but holds iteration {manifest.iteration}")
    if problems:
        raise CheckpointError(f"checkpoint {directory} cannot be used:\n" + "\n".join(f"  {text}" for text in problems))
    return manifest
