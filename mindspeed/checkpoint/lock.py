"""One job per --save directory: a second one would remove the first one's files under way.

The lock is a record lock of the operating system on a small file, which the kernel drops when the process
ends in whatever way, plus a text that says who holds it. Where such locks do not reach other machines (some
network file systems), the text decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from mindspeed.checkpoint.errors import save_error
from mindspeed.checkpoint.layout import LOCK
from mindspeed.checkpoint.team import SOLO, Team
from mindspeed.errors import CheckpointError

_JOB_VARIABLES = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")


class SaveLock:
    """Held by a job from its start to its end; `with` it, or call `acquire` and `release`. Collective over `team`."""

    def __init__(self, root: str | os.PathLike[str], *, team: Team = SOLO) -> None:
        self.path = Path(root) / LOCK
        self._team = team
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, also from a job that is gone.

        Raises:
            CheckpointError: another job saves here; names its host, pid and start, on every rank.
        """
        self._team.together(lambda: self._take() if self._team.leads else None)

    def _take(self) -> None:
        if self._descriptor is not None:
            return
        try:
            os.makedirs(self.path.parent, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise save_error(error, self.path.parent, outcome="Nothing was saved yet") from error
        try:
            self._claim(descriptor)
        except BaseException:
            os.close(descriptor)  # if this very process holds the lock by another object, the text still keeps others out
            raise
        self._descriptor = descriptor

    def _claim(self, descriptor: int) -> None:
        holder = _read(descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        except OSError:
            is_free = True  # this file system has no record locks; the text must do
        if not is_free or (holder and _may_live(holder)):
            raise CheckpointError(self._refusal(holder))
        content = json.dumps(_myself()).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)

    def _refusal(self, holder: Mapping[str, object]) -> str:
        who = (
            "another job"
            if not holder
            else f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')},"
        )
        remedy = f"give this job a --save of its own; if that job is gone for certain, remove {self.path}"
        return f"--save {self.path.parent}: {who} saves there. Remedy: {remedy}."

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> SaveLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _read(descriptor: int) -> dict[str, object]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return content if isinstance(content, dict) else {}
    except ValueError:
        return {}  # empty, or half written by a job that was killed just then


def _myself() -> dict[str, object]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "created": process.create_time(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process.create_time())),
        "job": _job(),
    }


def _job() -> str:
    """Name that a scheduler gives to a job and keeps over its restarts; empty outside of one."""
    names = (os.environ.get(variable, "") for variable in _JOB_VARIABLES)
    return next((name for name in names if name and name != "none"), "")


def _may_live(holder: Mapping[str, object]) -> bool:
    """Whether the process that wrote the text may still run; the pid alone may have been given to another one."""
    if holder.get("host") != socket.gethostname():
        # A restart of the same job on another machine takes over; for others, only a person can know.
        return not (holder.get("job") and holder.get("job") == _job())
    try:
        process = psutil.Process(int(str(holder.get("pid"))))
        created = float(str(holder.get("created")))
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1.0
    except (psutil.Error, ValueError):
        return False
