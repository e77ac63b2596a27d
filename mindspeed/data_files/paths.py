"""Whether a path is a file that can be read, said in one sentence; and whether it is still the same file later."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from mindspeed.errors import DataError

_REMOTE = ("s3://", "msc://")


def is_remote(prefix: str) -> bool:
    """Whether the host reads this prefix from object storage, where local checks say nothing."""
    return prefix.startswith(_REMOTE)


def readable_size(path: Path) -> int:
    """Size in bytes of a file that exists, is a file and can be opened.

    Raises:
        DataError: names the path and what it is instead.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(
                f"{path} is a link to {os.readlink(path)}, which does not exist. Restore the file it names."
            ) from None
        raise DataError(f"{path} does not exist. {_advice(path)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be reached: {error.strerror} (errno {error.errno}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} is a directory instead of a file. Give the common part of the .idx and .bin file names.")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file, so it cannot be mapped into memory. Copy it to a file.")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror} (errno {error.errno}). Give this user access to it."
        ) from error
    return status.st_size


def _advice(path: Path) -> str:
    prefix = path.with_suffix("")
    if prefix.suffix in (".idx", ".bin"):
        return f"Give the prefix without its ending: {prefix.with_suffix('')}."
    return "A data prefix stands for two files, <prefix>.idx and <prefix>.bin, as `mindspeed preprocess` makes them."


@dataclass(frozen=True)
class FileStamp:
    """Identity of a file when it was checked, to notice that it was replaced while a run reads it."""

    path: Path
    device: int
    inode: int
    size: int
    changed_ns: int

    @staticmethod
    def of(path: Path) -> FileStamp:
        """Stamp of a file as it is now."""
        status = os.stat(path)
        return FileStamp(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Compare with the file as it is now; one system call.

        Raises:
            DataError: it was replaced, changed or removed.
        """
        try:
            now = FileStamp.of(self.path)
        except OSError as error:
            raise DataError(f"{self.path} has become unreachable while the run reads it: {error.strerror}.") from error
        if now != self:
            raise DataError(
                f"{self.path} was replaced or changed while the run reads it ({self.size} bytes before, {now.size} now). "
                "Write new data under a new name and start again."
            )
