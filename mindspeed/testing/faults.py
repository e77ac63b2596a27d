"""File-system calls that fail on demand: find out what is left when a process dies, or a disk fills up, at call k.

    with FileCalls() as seen:                 # count first
        save()
    for k in range(len(seen.calls)):
        with FileCalls(at=k, fault=errno.ENOSPC):
            save()                            # call k raises OSError(ENOSPC)

Counted are the calls of this process, made from Python, that change files: open for writing, write, fsync,
rename and replace, unlink, mkdir, rmdir, truncate. Writes are counted as they reach the system, below
Python's buffer. Code that opens files in C or C++ is not seen: give such code a Python file object.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any

KILL = "kill"
SHORT_WRITE = "short write"
_CALLS = ("open", "mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "fsync", "write", "pwrite", "ftruncate")


class FileCalls:
    """Counts calls, and makes call number `at` fail.

    Args:
        at: index of the call; None only counts.
        fault: KILL (the process ends by SIGKILL before the call), SHORT_WRITE (a write takes half of its bytes and
            says so; other calls are left alone), or an errno to be raised as OSError.

    Attributes:
        calls: "name path" of each call so far.
    """

    def __init__(self, at: int | None = None, fault: str | int = KILL) -> None:
        self.calls: list[str] = []
        self._at = at
        self._fault = fault
        self._originals: list[tuple[Any, str, Any]] = []

    def count(self, name: str, path: object) -> bool:
        """Note one call; returns whether this write is to be cut short."""
        index = len(self.calls)
        self.calls.append(f"{name} {path}")
        if index != self._at:
            return False
        if self._fault == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(self._fault, int):
            filename = path if isinstance(path, str | bytes | os.PathLike) else None
            raise OSError(self._fault, f"{os.strerror(self._fault)} [injected]", filename)
        return self._fault == SHORT_WRITE and name in ("write", "pwrite")

    def __enter__(self) -> FileCalls:
        for name in _CALLS:
            self._put(os, name, self._counted(name, getattr(os, name)))
        opener = self._opener(builtins.open)
        self._put(io, "open", opener)
        self._put(builtins, "open", opener)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def _put(self, owner: Any, name: str, value: Any) -> None:
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.count(name, args[0] if args else "") and len(args) > 1:
                args = (args[0], args[1][: len(args[1]) // 2], *args[2:])
            return original(*args, **options)

        return call

    def _opener(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def opener(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return original(file, mode, buffering, *text, **options)
            self.count("open", file)
            raw = _CountedFile(self, file, mode.replace("b", "").replace("t", ""))
            if "b" in mode and buffering == 0:
                return raw
            stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return stream if "b" in mode else io.TextIOWrapper(stream, *text, **options)

        return opener


class _CountedFile(io.FileIO):
    """An unbuffered file whose writes are counted."""

    def __init__(self, calls: FileCalls, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._calls = calls

    def write(self, data: Any) -> int:
        """Write to the file, or half of it."""
        if self._calls.count("write", self.name):
            data = memoryview(data)[: max(1, len(data) // 2)]
        return super().write(data)
