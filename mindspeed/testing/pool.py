"""Pools of long-lived gloo ranks, one pool for each world size, for tests and benchmarks.

    outcomes = pools().get(4).run(body, seq_length=64)      # body(world, seq_length=...) on four ranks

Ranks are forked from one process that has imported torch already, so a pool starts in a fraction of a second. A pool
whose test failed or hung is killed and started afresh; one whose test passed is cleaned and used again.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import pickle
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindspeed.testing.worker import Outcome, Task
from mindspeed.testing.zygote import receive, send

TORCH_MODULES = ("torch", "torch.distributed", "torch.utils._python_dispatch", "mindspeed.testing.worker")
MEGATRON_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)
GRACE_SECONDS = 3.0  # how long ranks may go on once one of them has failed
OUTPUT_LIMIT = 8000  # characters of a rank's output that a failure shows


class RankFailure(AssertionError):
    """A test body failed on some rank; the text holds every rank's story."""


class RankSkip(Exception):
    """All ranks of a test body asked to be skipped."""


class Zygote:
    """The process from which ranks are forked."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        environment = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        environment |= {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
        self._channel = ours
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from mindspeed.testing.zygote import main; main()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()

    def fork(self, size: int, directory: Path, preload: tuple[str, ...]) -> tuple[list[socket.socket], list[int]]:
        """Start `size` ranks; returns a channel and a process id for each."""
        pairs = [socket.socketpair() for _ in range(size)]
        request = {"directory": str(directory), "preload": preload}
        send(self._channel, request, tuple(theirs.fileno() for _, theirs in pairs))
        for _, theirs in pairs:
            theirs.close()
        pids, _ = receive(self._channel)
        return [ours for ours, _ in pairs], pids

    def close(self) -> None:
        """End the process."""
        self._channel.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pool:
    """`size` ranks that run one test body after the other."""

    def __init__(self, zygote: Zygote, size: int, preload: tuple[str, ...] = TORCH_MODULES) -> None:
        self.size = size
        self.preload = preload
        self._zygote = zygote
        self._directory = Path(tempfile.mkdtemp(prefix=f"mindspeed-ranks{size}-"))
        self._channels: list[socket.socket] = []
        self._pids: list[int] = []
        self._generation = 0
        self._tasks = 0

    def run(self, body: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call `body(world, *args, **kwargs)` on every rank and return the values in order of rank.

        Args:
            body: a function that can be found by its module and qualified name.
            timeout: seconds after which all ranks are stopped and their stacks shown.

        Raises:
            RankFailure: a rank raised, ended, or did not finish in time.
            RankSkip: every rank asked to be skipped.
        """
        __tracebackhide__ = True
        self._start()
        self._tasks += 1
        shared = self._directory / f"shared{self._tasks}"
        shared.mkdir()
        try:
            task = self._task(body, args, kwargs, shared)
            for rank, channel in enumerate(self._channels):
                self._send(rank, channel, task)
            outcomes = self._collect(timeout)
            self._raise_failures(outcomes, timeout)
        except BaseException:
            self.kill()
            raise
        finally:
            shutil.rmtree(shared, ignore_errors=True)
        return self._finish([outcome for outcome in outcomes if outcome is not None])

    def _send(self, rank: int, channel: socket.socket, task: Task) -> None:
        try:
            send(channel, task)
        except ConnectionError:
            raise RankFailure(f"rank {rank} ended while it cleaned up after the test before\n{self._output(rank)}") from None

    def _finish(self, outcomes: list[Outcome]) -> list[Any]:
        if all(outcome.group_intact for outcome in outcomes):
            for channel in self._channels:
                send(channel, "clean")
        else:
            self.kill()  # forking afresh is cheaper than agreeing on a new default group
        if reasons := [outcome.skipped for outcome in outcomes if outcome.skipped]:
            raise RankSkip(reasons[0])
        return [outcome.value for outcome in outcomes]

    def _start(self) -> None:
        if self._channels:
            return
        self._generation += 1
        self._channels, self._pids = self._zygote.fork(self.size, self._directory, self.preload)

    def _task(self, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shared: Path) -> Task:
        return Task(
            module=body.__module__,
            file=inspect.getsourcefile(inspect.unwrap(body)) or "",
            qualname=body.__qualname__,
            values=pickle.dumps((args, kwargs)),
            shared_dir=str(shared),
            python_path=tuple(sys.path),
            nan_uninitialised=torch.are_deterministic_algorithms_enabled(),
            generation=self._generation,
        )

    def _collect(self, timeout: float) -> list[Outcome | None]:
        """Outcomes by rank; None for a rank that had to be given up."""
        outcomes: list[Outcome | None] = [None] * self.size
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for rank, channel in enumerate(self._channels):
                selector.register(channel, selectors.EVENT_READ, rank)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    selector.unregister(key.fileobj)
                    outcomes[key.data] = outcome = self._receive(key.data)
                    if outcome.failed:  # the others probably wait for this rank
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return outcomes

    def _receive(self, rank: int) -> Outcome:
        try:
            outcome, _ = receive(self._channels[rank])
            return outcome
        except (EOFError, ConnectionError):
            return Outcome(failed=True, summary="the process ended", trace=self._stacks(rank) or "It left no Python stack.\n")

    def _raise_failures(self, outcomes: list[Outcome | None], timeout: float) -> None:
        __tracebackhide__ = True
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None and outcome.failed}
        unfinished = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
        if not failed and not unfinished:
            return
        head = [f"rank {rank} of {self.size}: {outcome.summary}" for rank, outcome in failed.items()]
        if not failed:
            head.append(f"ranks {unfinished} of {self.size} did not finish within {timeout:g} s")
        parts = ["\n".join(head)]
        parts += [f"--- rank {rank}\n{outcome.trace}" for rank, outcome in failed.items()]
        parts += [f"--- rank {rank} was still here\n{self._ask_for_stacks(rank)}" for rank in unfinished]
        parts += [f"--- output of rank {rank}\n{text}" for rank in range(self.size) if (text := self._output(rank))]
        raise RankFailure("\n".join(parts))

    def _ask_for_stacks(self, rank: int) -> str:
        """Make a busy rank write down where it is, even if it is inside C++."""
        try:
            os.kill(self._pids[rank], signal.SIGUSR1)
        except ProcessLookupError:
            return "the process is gone"
        for _ in range(100):
            time.sleep(0.02)
            if "most recent call first" in (text := self._stacks(rank)) and text.endswith("\n"):
                return text
        return "the process did not answer: it is stopped or has its signals blocked\n"

    def _stacks(self, rank: int) -> str:
        path = self._directory / f"rank{rank}.stacks"
        return path.read_text() if path.exists() else ""

    def _output(self, rank: int) -> str:
        path = self._directory / f"rank{rank}.out"
        return path.read_text(errors="replace")[-OUTPUT_LIMIT:] if path.exists() else ""

    def kill(self) -> None:
        """End all ranks at once; the next `run` starts new ones."""
        for pid in self._pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for channel in self._channels:
            channel.close()
        self._channels, self._pids = [], []
        for path in self._directory.glob("rank*"):
            path.unlink()

    def close(self) -> None:
        """End all ranks and remove the pool's directory."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


class Pools:
    """All pools of this process; they share one zygote."""

    def __init__(self) -> None:
        self._zygotes: dict[str, Zygote] = {}
        self._pools: dict[int, Pool] = {}

    def zygote_for(self, purpose: str = "") -> Zygote:
        """A common ancestor of ranks, started when first needed; what it imported for one purpose stays out of others."""
        if purpose not in self._zygotes:
            self._zygotes[purpose] = Zygote()
        return self._zygotes[purpose]

    def get(self, size: int, *, megatron: bool = False) -> Pool:
        """The pool of `size` ranks; `megatron` has megatron-core imported before the ranks are forked."""
        pool = self._pools.get(size)
        if pool is not None and megatron and pool.preload == TORCH_MODULES:
            pool.close()
            pool = None
        if pool is None:
            pool = self._pools[size] = Pool(self.zygote_for(), size, TORCH_MODULES + MEGATRON_MODULES * megatron)
        return pool

    def close(self) -> None:
        """End every process; `get` starts afresh."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        for zygote in self._zygotes.values():
            zygote.close()
        self._zygotes.clear()


@functools.cache
def pools() -> Pools:
    """The pools of this process, closed when it ends."""
    made = Pools()
    atexit.register(made.close)
    return made
