"""The directory of sample indices (--data-cache-path): can it be written, and is what lies there whole?

The host takes a file that exists for a finished one. A job killed while it wrote leaves a half one, which
later jobs read; `mend_cache` removes it, and the host builds it again.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mindspeed.errors import DataError

logger = logging.getLogger(__name__)
_REMEDIES = {
    errno.ENOSPC: "free space there, or name another directory with --data-cache-path",
    errno.EDQUOT: "your quota is used up; name another directory with --data-cache-path",
}
_PARTS = ("document_index.npy", "sample_index.npy", "shuffle_index.npy", "dataset_index.npy", "dataset_sample_index.npy")


def check_cache(directory: str | os.PathLike[str], *, needed: int = 1 << 16) -> None:
    """Make the directory if it is missing, and write `needed` bytes to it for a moment.

    Raises:
        DataError: it is read-only, full or no directory; names errno and remedy.
    """
    with cache_failures(directory):
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".mindspeed_probe_") as stream:
            stream.write(bytes(needed))
            stream.flush()


@contextmanager
def cache_failures(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Put around the building of indices: a file-system failure becomes one DataError."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        path = os.fsdecode(error.filename) if error.filename else os.fspath(directory)
        remedy = _REMEDIES.get(error.errno or 0, "name a directory that can be written with --data-cache-path")
        raise DataError(
            f"--data-cache-path {os.fspath(directory)}: {path} cannot be written: {name} ({error.strerror}). Remedy: {remedy}."
        ) from error


def mend_cache(directory: str | os.PathLike[str]) -> list[Path]:
    """Remove the indices that a killed job left half written; one rank calls it before the indices are built.

    Returns:
        The removed files: all parts of every set of which one part is damaged.
    """
    root = Path(directory)
    if not root.is_dir():
        return []
    damaged = [path for path in sorted(root.glob("*.npy")) if path.name.endswith(_PARTS) and not _is_whole_array(path)]
    removed = []
    for path in damaged:
        part = next(part for part in _PARTS if path.name.endswith(part))
        stem = path.name[: -len(part)]
        for other in sorted(root.glob(f"{_escaped(stem)}*")):
            other.unlink()
            removed.append(other)
        logger.warning("%s was half written by a job that was interrupted; it is built again", path)
    return removed


def _escaped(stem: str) -> str:
    """Literal text for a glob pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in stem)


def _is_whole_array(path: Path) -> bool:
    """Header readable, and exactly as many bytes as it promises."""
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            return stream.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize == path.stat().st_size
    except ValueError:
        return False
