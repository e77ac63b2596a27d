"""Start the ranks of one machine without torchrun, watch them, and leave nothing behind.

No torch is imported here: the launcher starts at once and costs nothing while the ranks work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ERROR_FILE = "MINDSPEED_ERROR_FILE"  # where a worker describes its failure
LAUNCHER = "MINDSPEED_LAUNCHER_PID"  # process that a worker must not outlive
STORE_SOCKET = "MINDSPEED_STORE_SOCKET"  # descriptor of the socket that rank 0's store listens on
REFUSED = 2  # exit status of a rank whose command line cannot be honoured: every rank says the same
GRACE_SECONDS = 5.0  # between a polite signal and SIGKILL
SETTLE_SECONDS = 1.0  # after the first failure, for the others to tell their own
_POLL_SECONDS = 0.05


def reserved_port() -> socket.socket:
    """A socket bound to a free port of the loopback interface; rank 0 inherits it, so that nobody can take the port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.set_inheritable(True)
    return listener


@dataclass
class Rank:
    """One worker process; `failed_at` is when the launcher saw it end with a failure."""

    number: int
    process: subprocess.Popen[bytes]
    error_file: Path
    failed_at: float | None = None

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal, None while it runs."""
        return self.process.poll()

    def failure(self) -> dict[str, Any]:
        """What the worker told about its end, or what its exit status tells."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self.error_file.read_text(encoding="utf-8")))
        status = self.process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        return {"time": self.failed_at or time.time(), "summary": how, "trace": ""}


class Launcher:
    """Runs `python -m <module> <arguments>` on `nproc` ranks that meet on loopback.

    Args:
        nproc: number of ranks.
        arguments: command line of every rank.
        module: what each rank runs.
        environment: further variables.
    """

    def __init__(
        self,
        nproc: int,
        arguments: Sequence[str],
        *,
        module: str = "mindspeed.training",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._nproc = nproc
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = dict(environment or {})
        self._ranks: list[Rank] = []
        self._signals = 0

    def run(self) -> int:
        """Start all ranks and wait for their end.

        Returns:
            0 when all succeeded, otherwise the exit status of the first that failed. Its report is the last
            thing printed.
        """
        with tempfile.TemporaryDirectory(prefix="mindspeed-") as folder, self._forwarding_signals():
            try:
                with reserved_port() as listener:
                    self._start(Path(folder), listener)
                self._wait()
            finally:
                self._end_all()
            return self._conclude()

    def _start(self, folder: Path, listener: socket.socket) -> None:
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "WORLD_SIZE": str(self._nproc),
            "LOCAL_WORLD_SIZE": str(self._nproc),
            LAUNCHER: str(os.getpid()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self._nproc)),
        }
        for number in range(self._nproc):
            error_file = folder / f"rank{number}.json"
            own = {"RANK": str(number), "LOCAL_RANK": str(number), ERROR_FILE: str(error_file)}
            passed = (listener.fileno(),) if number == 0 else ()
            own |= {STORE_SOCKET: str(listener.fileno())} if passed else {}
            environment = {**os.environ, **shared, **own, **self._environment}
            # in sessions of their own, so that Ctrl-C reaches them through us alone and only once
            process = subprocess.Popen(self._command, env=environment, start_new_session=True, pass_fds=passed)
            self._ranks.append(Rank(number, process, error_file))

    def _wait(self) -> None:
        """Until all have ended, or one has failed and the others had time to say why."""
        deadline: float | None = None
        while any(rank.status is None for rank in self._ranks):
            for rank in self._ranks:
                if rank.status and rank.failed_at is None:
                    rank.failed_at = time.time()
                    deadline = deadline or time.monotonic() + SETTLE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)

    def _end_all(self) -> None:
        """SIGTERM, and SIGKILL after the grace; a stopped process is woken for it."""
        alive = [rank for rank in self._ranks if rank.status is None]
        for rank in alive:
            _send(rank, signal.SIGTERM)
            _send(rank, signal.SIGCONT)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(rank.status is None for rank in alive):
            time.sleep(_POLL_SECONDS)
        for rank in alive:
            if rank.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()

    def _conclude(self) -> int:
        """Print the report of the rank that failed first; the others followed it."""
        forced = self._signals > 1
        failed = [
            rank
            for rank in self._ranks
            if rank.process.returncode > 0 or rank.failed_at is not None or (forced and rank.status)
        ]
        if not failed:
            return 0
        reports = {rank.number: rank.failure() for rank in failed}
        first = min(failed, key=lambda rank: reports[rank.number]["time"])
        report, status = reports[first.number], first.process.returncode
        if report["trace"]:
            print(report["trace"], file=sys.stderr)
        where = "" if status == REFUSED else f" rank {first.number}:"
        print(f"mindspeed:{where} {report['summary']}", file=sys.stderr, flush=True)
        return status if status > 0 else 128 - status

    @contextlib.contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM go to all ranks; the second ends them at once."""

        def forward(number: int, frame: Any) -> None:
            self._signals += 1
            for rank in self._ranks:
                _send(rank, signal.Signals(number))

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _send(rank: Rank, number: signal.Signals) -> None:
    if rank.status is None:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(number)


def launch(nproc: int, arguments: Sequence[str], **options: Any) -> int:
    """Run the trainer on `nproc` ranks; returns the exit status (see `Launcher`)."""
    return Launcher(nproc, arguments, **options).run()
