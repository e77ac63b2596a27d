"""Runs test bodies in another, long-lived process that was started with other settings than this one.

For what a process can only be once: torch_npu loaded (it patches torch globally), Triton in interpreter mode (chosen when it
is first imported). A decorated test is collected here, and its body runs there; see `npu_contract` and `triton_interpreter`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any


class RemoteFailure(AssertionError):
    """A test body failed in another process; the text is that process's traceback and output."""


@dataclass(frozen=True)
class Place:
    """A kind of process. `setup` is "module:function", called there once; it returns arguments for every body, by name."""

    name: str
    setup: str
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


class Process:
    """A process of one kind: started on first use, again after a crash."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log = tempfile.TemporaryFile()

    def run(
        self, function: Callable[..., None], arguments: Mapping[str, Any], seconds: float, around: tuple[str, ...] = ()
    ) -> None:
        """Run a module-level function there; raises RemoteFailure with the remote traceback.

        around: "module:context_manager" and its arguments, entered before the function.
        """
        connection = self._started()
        logged = self._log.seek(0, os.SEEK_END)
        connection.send((function.__code__.co_filename, function.__qualname__, dict(arguments), around, list(sys.path)))
        try:
            if not connection.poll(seconds):
                self._end(signal.SIGABRT)  # faulthandler prints the stacks of all threads
                raise RemoteFailure(f"no answer from the {self.place.name} process in {seconds:.0f} s\n{self._output(logged)}")
            failure = connection.recv()
        except EOFError:
            code = self._end(signal.SIGKILL)
            raise RemoteFailure(f"the {self.place.name} process died with exit code {code}\n{self._output(logged)}") from None
        if failure is not None:
            raise RemoteFailure(f"in the {self.place.name} process:\n{failure}{self._output(logged)}")

    def close(self) -> None:
        """End the process; this object cannot be used any more."""
        if self._process is not None:
            self._end(signal.SIGKILL)
        self._log.close()

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        ours, theirs = multiprocessing.Pipe()
        place = self.place
        command = f"from {__name__} import serve; serve({theirs.fileno()}, {place.setup!r}, {place.arguments!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **place.environment},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        theirs.close()
        self._connection = ours
        return ours

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None and self._connection is not None
        self._process.send_signal(how)
        code = self._process.wait(timeout=30)
        self._connection.close()
        self._process = self._connection = None
        return code

    def _output(self, since: int) -> str:
        self._log.seek(since)
        text = self._log.read().decode(errors="replace")[-8000:]
        return f"\noutput of the process:\n{text}" if text else ""


@functools.cache
def shared_process(name: str, place: Callable[[], Place]) -> Process:
    """The process of this kind that all tests of the session share."""
    process = Process(place())
    atexit.register(process.close)
    return process


def shipped(
    function: Callable[..., None], process: Callable[[], Process], unavailable: Callable[[], str | None], supplied: set[str],
    *, seconds: float, keep: bool = True, around: tuple[str, ...] = (),
) -> Callable[..., None]:  # fmt: skip
    """The test that runs `function` in `process()`; skipped for the reason that `unavailable()` gives.

    supplied: names of arguments that the process fills in and that pytest must not look for. keep: the process is shared.
    around: see `Process.run`.
    """
    import pytest

    signature = inspect.signature(function)
    visible = [parameter for name, parameter in signature.parameters.items() if name not in supplied]

    @functools.wraps(function)
    def in_other_process(**arguments: Any) -> None:
        if reason := unavailable():
            pytest.skip(reason)
        there = process()
        try:
            there.run(function, arguments, seconds, around)
        finally:
            if not keep:
                there.close()

    in_other_process.__signature__ = signature.replace(parameters=visible)  # type: ignore[attr-defined]
    return in_other_process


# ---- the other side -----------------------------------------------------------------------------------------------------


def serve(connection_number: int, setup: str, arguments: tuple[str, ...]) -> None:
    """Body of the process: set up, then answer requests until the other end closes."""
    connection = Connection(connection_number)
    supplied: Mapping[str, Any] = _named(setup)(*arguments)
    while True:
        try:
            path, function, given, around, search = connection.recv()
        except EOFError:
            return
        sys.path.extend(entry for entry in search if entry not in sys.path)
        connection.send(_failure_of(path, function, given, around, supplied))


def _named(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def _failure_of(
    path: str, name: str, given: Mapping[str, Any], around: tuple[str, ...], supplied: Mapping[str, Any]
) -> str | None:
    try:
        function = inspect.unwrap(getattr(_module(path), name))
        wanted = inspect.signature(function).parameters
        for value in supplied.values():
            value.reset()
        with _named(around[0])(*around[1:]) if around else contextlib.nullcontext():
            function(**given, **{key: value for key, value in supplied.items() if key in wanted})
    except Exception as error:
        return "".join(traceback.format_exception(error)) + _values(error, path)
    return None


def _values(error: Exception, path: str) -> str:
    """Local variables of the innermost frame in the test's own file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    local = frames[-1].f_locals if frames else {}
    return "".join(f"    {name} = {_description(value)}\n" for name, value in local.items())


def _description(value: object) -> str:
    import torch

    if isinstance(value, torch.Tensor):  # printing its values would launch kernels
        return f"Tensor({value.dtype}, {list(value.shape)}, {value.device})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_description, value))}]"
    if isinstance(value, str | int | float | torch.dtype) or type(value).__str__ is not object.__str__:
        return str(value)
    return f"<{type(value).__name__}>"


@functools.cache
def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"shipped_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
