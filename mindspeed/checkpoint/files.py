"""File-system calls of the checkpoint code: durable writes, checksums, listing and removal.

A name becomes durable only when its directory was fsynced; a content only when the file was. Both are
done here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

CHUNK = 16 << 20  # bytes per checksum: small enough to say where a file is damaged, large enough to keep the list short
_BUFFER = 1 << 20


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of `path` durable, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path` for good: a reader or a crash sees the old file or the new one, nothing else."""
    replace_durably(path, content)
    fsync_directory(path.parent)


def replace_durably(path: Path, content: bytes) -> None:
    """`write_durably` without its last step: after a crash, the name may still lead to the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def chunk_checksum(path: Path, index: int) -> str:
    """CRC-32, as 8 hex digits, of the bytes from `index * CHUNK` to the next border or the end."""
    buffer = bytearray(_BUFFER)
    view = memoryview(buffer)
    crc, left = 0, CHUNK
    with open(path, "rb", buffering=0) as stream:
        stream.seek(index * CHUNK)
        while left and (count := stream.readinto(view[: min(left, _BUFFER)])):
            crc = zlib.crc32(view[:count], crc)
            left -= count
    return f"{crc:08x}"


def chunk_count(size: int) -> int:
    """Number of checksums of a file."""
    return -(-size // CHUNK)


def files_below(directory: Path) -> list[str]:
    """Relative names, with "/" between parts, of all files below `directory`, sorted."""
    return sorted(_walk(str(directory), ""))


def _walk(directory: str, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def remove_tree(directory: Path, *, first: str) -> None:
    """Remove a directory, the file `first` before all others, so that a half-removed one never looks whole."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / first)
    for name in files_below(directory):
        os.unlink(directory / name)
    for folder, _, _ in os.walk(directory, topdown=False):
        os.rmdir(folder)
