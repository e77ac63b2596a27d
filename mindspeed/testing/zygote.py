"""The process from which all test ranks are forked: torch (and megatron) is imported once, then inherited.

Started by `mindspeed.testing.pool`, which calls `main` in a fresh interpreter. It must stay single-threaded and must
never create a process group, a device context or an OpenMP region: a fork would inherit their broken remains.
"""

from __future__ import annotations

import array
import ctypes
import importlib
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
import warnings
from typing import Any

PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("!Q")
MAX_RANKS = 250  # file descriptors that Linux passes in one message


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere a closed pipe does it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def send(channel: socket.socket, message: Any, descriptors: tuple[int, ...] = ()) -> None:
    """Send one pickled message, with open file descriptors beside its header."""
    body = pickle.dumps(message)
    header = _LENGTH.pack(len(body))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([header], rights)
    channel.sendall(body)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Counterpart of `send`.

    Raises:
        EOFError: the other side is gone.
    """
    header, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, MAX_RANKS)
    body = _read(channel, _LENGTH.unpack(header + _read(channel, _LENGTH.size - len(header)))[0])
    return pickle.loads(body), list(descriptors)


def _read(channel: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes."""
    chunks = []
    while count:
        chunk = channel.recv(min(count, 1 << 20))
        if not chunk:
            raise EOFError("the other process closed its end")
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def serve(channel: socket.socket) -> None:
    """Fork the ranks that the pool asks for until the pool closes the channel."""
    while True:
        try:
            request, descriptors = receive(channel)
        except EOFError:
            return
        _preload(request["preload"])
        pids = [_fork_rank(request, rank, descriptors, channel) for rank in range(len(descriptors))]
        for descriptor in descriptors:
            os.close(descriptor)
        send(channel, pids)


def _preload(modules: tuple[str, ...]) -> None:
    """Import what the ranks will need anyway; a module that cannot be imported fails in the test that uses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            try:
                importlib.import_module(module)
            except ImportError:
                return


def _fork_rank(request: dict[str, Any], rank: int, descriptors: list[int], channel: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        die_with_parent()
        channel.close()
        own = descriptors[rank]
        for descriptor in descriptors:
            if descriptor != own:
                os.close(descriptor)
        from mindspeed.testing import worker

        worker.serve(socket.socket(fileno=own), rank, len(descriptors), request["directory"])
        status = 0
    except BaseException:  # the rank's output file is the only place left to tell it
        traceback.print_exc()
    finally:
        os._exit(status)  # never unwind into the zygote's own loop


def main() -> None:
    """Read the descriptor of the channel from the command line and serve it."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the channel
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended ranks
    serve(socket.socket(fileno=int(sys.argv[1])))
