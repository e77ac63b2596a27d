"""What the operating system said, turned into one sentence with path, errno and remedy."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from mindspeed.errors import CheckpointError

_REMEDIES = {
    errno.ENOSPC: "free space there, or save to another file system with --save",
    errno.EDQUOT: "your quota is used up; free space there, or save elsewhere with --save",
    errno.EIO: "the device failed; check the kernel log, and save to another file system with --save",
    errno.EACCES: "give this user permission to write there, or choose another directory with --save",
    errno.EPERM: "give this user permission to write there, or choose another directory with --save",
    errno.EROFS: "the file system is read-only; choose another directory with --save",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "something removed it during the save; let one job alone use this directory",
    errno.ENOTDIR: "a part of the path is a file; choose another directory with --save",
}
_DEFAULT_REMEDY = "mend the cause, or choose another directory with --save"


def find_os_error(error: BaseException | None) -> OSError | None:
    """The OSError at the root of `error`, looking through causes and torch's per-rank failure tables."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno is not None:
            return current
        # torch.distributed.checkpoint wraps what went wrong on each rank as {rank: (exception, traceback)}.
        failures = getattr(current, "failures", None)
        if isinstance(failures, dict):
            queue.extend(item[0] if isinstance(item, tuple) else item for item in failures.values())
        queue.extend([current.__cause__, current.__context__])
    return None


def is_write_failure(error: BaseException) -> bool:
    """Whether a failed save is the file system's doing rather than a mistake in the program."""
    if find_os_error(error) is not None:
        return True
    # torch writes archives in C++ and reports a failed write without its errno.
    text = str(error)
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)


def save_error(error: BaseException, directory: Path, *, outcome: str) -> CheckpointError:
    """One `CheckpointError` that names path, errno, what became of the previous checkpoint, and the remedy."""
    cause = find_os_error(error)
    if cause is None:
        free = _free_bytes(directory)
        what = f"{directory} cannot be written ({str(error).splitlines()[0]}; {free} bytes free there)"
        return CheckpointError(f"{what}. {outcome}. Remedy: {_DEFAULT_REMEDY}.")
    path = cause.filename2 or cause.filename or directory
    name = errno.errorcode.get(cause.errno or 0, str(cause.errno))
    what = f"{os.fsdecode(path)} cannot be written: {name} (errno {cause.errno}, {cause.strerror})"
    return CheckpointError(f"{what}. {outcome}. Remedy: {_REMEDIES.get(cause.errno or 0, _DEFAULT_REMEDY)}.")


def _free_bytes(directory: Path) -> str:
    for place in (directory, *directory.parents):
        try:
            return str(shutil.disk_usage(place).free)
        except OSError:
            continue
    return "unknown"
