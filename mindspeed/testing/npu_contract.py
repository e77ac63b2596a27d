"""Runs tests against the real torch_npu C++ code on a machine without an NPU.

    @npu_contract()
    def test_rms_norm_calls(calls, dtype):
        y = rms_norm(torch.ones(4, 16, dtype=dtype, device="npu"), ...)
        assert calls.names == ["aclnnRmsNorm"]

The decorated body runs in a process of its own (torch_npu patches torch globally), which all such tests share. There the
wheel is loaded on stub CANN libraries (`tools/npu_contract/build.py`): memory is host memory, schemas, shape functions,
autograd and dispatch are torch_npu's own, and kernels succeed without computing. So **values of results mean nothing**; test
shapes, dtypes, strides, gradients present, the list of calls, and that bad input raises our error before any call.

`calls` is not a fixture: the process fills it in. Other arguments (parametrize, fixtures) must be picklable.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

# aclDataType of torch_npu's include/acl/acl_base_rt.h; torch's names.
DTYPES: Mapping[int, str] = {
    0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16", 8: "uint32", 9: "int64",
    10: "uint64", 11: "float64", 12: "bool", 16: "complex64", 17: "complex128", 27: "bfloat16",
}  # fmt: skip
DEVICE_LIBRARY = "libascendcl.so"


@dataclass(frozen=True)
class TensorArgument:
    """One tensor as the kernel got it."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Call:
    """One kernel launch: its name and the tensors and integer lists that it got.

    torch_npu creates a call's arguments from last to first (evaluation order of its compiler); here they are turned round, so
    that they stand in the order of the aclnn function, outputs last. Members of one tensor list are turned round with them.
    """

    name: str
    tensors: tuple[TensorArgument, ...]
    int_lists: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.tensors))})"


class Calls:
    """The kernel launches of the contract process since the last `reset`, oldest first."""

    def __init__(self, device: ctypes.CDLL) -> None:
        self._device = device
        device.contract_count.restype = ctypes.c_size_t
        device.contract_get.restype = ctypes.c_char_p
        device.contract_get.argtypes = [ctypes.c_size_t]

    def __iter__(self) -> Iterator[Call]:
        for index in range(self._device.contract_count()):
            record = json.loads(self._device.contract_get(index))
            arguments = record["arguments"][::-1]
            tensors = (
                TensorArgument(DTYPES.get(row["dtype"], f"acl{row['dtype']}"), tuple(row["shape"]), tuple(row["strides"]))
                for row in arguments
                if "dtype" in row
            )
            yield Call(record["name"], tuple(tensors), tuple(tuple(row["ints"]) for row in arguments if "ints" in row))

    @property
    def names(self) -> list[str]:
        """Names of all kernels launched, in order: `aclnn…`, `Hccl…`, or the operator name on the older compile path."""
        return [call.name for call in self]

    def named(self, name: str) -> list[Call]:
        """The launches of one kernel."""
        return [call for call in self if call.name == name]

    def reset(self) -> None:
        """Forget what was recorded."""
        self._device.contract_reset()

    def __repr__(self) -> str:
        return f"Calls[{', '.join(map(str, self))}]"


class ContractFailure(AssertionError):
    """A test body failed in the contract process; the text is that process's traceback and output."""


def npu_contract(*, fresh: bool = False, load: bool = True, seconds: float = 60.0) -> Callable[[Callable[..., None]], Any]:
    """Decorate a test so that its body runs on the emulated NPU; marks it `npu_contract`.

    fresh: in a new process, for tests that change torch in ways that cannot be undone. load: import torch_npu first (False
    needs fresh: for tests of whoever imports it). seconds: the process is ended, with its stacks shown, after that time.
    The test is skipped, with the reason, where the environment cannot be made; see `unavailable`.
    """
    if not load and not fresh:
        raise ValueError("npu_contract: load=False needs fresh=True, because other tests have loaded torch_npu by then.")

    def decorate(function: Callable[..., None]) -> Any:
        import pytest

        signature = inspect.signature(function)
        visible = [parameter for name, parameter in signature.parameters.items() if name != "calls"]

        @functools.wraps(function)
        def in_contract_process(**arguments: Any) -> None:
            if reason := unavailable():
                pytest.skip(reason)
            process = ContractProcess(load) if fresh else shared_process()
            try:
                process.run(function, arguments, seconds)
            finally:
                if fresh:
                    process.close()

        in_contract_process.__signature__ = signature.replace(parameters=visible)  # type: ignore[attr-defined]
        return pytest.mark.npu_contract(in_contract_process)

    return decorate


@functools.cache
def builder() -> ModuleType | None:
    """`tools/npu_contract/build.py` of this checkout; None for an installed package without it."""
    path = Path(__file__).resolve().parents[2] / "tools" / "npu_contract" / "build.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("mindspeed_npu_contract_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def unavailable() -> str | None:
    """Why contract tests cannot run here, or None once everything is built.

    A wheel that was downloaded before is built at need (seconds). The download itself is only done in CI (`CI=true`), where a
    failure to build is an error, or by calling the build script.
    """
    tool = builder()
    if tool is None:
        return "npu contract: tools/npu_contract/build.py is not beside the package; run the tests from a checkout"
    if reason := tool.obstacle():
        return f"npu contract: {reason}"
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    if tool.built() is None and not in_ci and not any((tool.ROOT / "wheel").glob("*.whl")):
        return "npu contract: the torch_npu wheel is not here; run `python tools/npu_contract/build.py` once"
    tool.build()
    return None


# ---- this side: start the process, ship functions to it -------------------------------------------------------------------


class ContractProcess:
    """A Python process with torch_npu on the emulated device; started on first use, again after a crash."""

    def __init__(self, load: bool = True) -> None:
        self._load = load
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log = tempfile.TemporaryFile()

    def run(self, function: Callable[..., None], arguments: Mapping[str, Any], seconds: float) -> None:
        """Run a module-level function there; raises ContractFailure with the remote traceback."""
        connection = self._started()
        logged = self._log.seek(0, os.SEEK_END)
        connection.send((function.__code__.co_filename, function.__qualname__, dict(arguments), list(sys.path)))
        try:
            if not connection.poll(seconds):
                self._end(signal.SIGABRT)  # faulthandler prints the stacks of all threads
                raise ContractFailure(f"no answer from the contract process in {seconds:.0f} s\n{self._output(logged)}")
            failure = connection.recv()
        except EOFError:
            code = self._end(signal.SIGKILL)
            raise ContractFailure(f"the contract process died with exit code {code}\n{self._output(logged)}") from None
        if failure is not None:
            raise ContractFailure(f"in the contract process:\n{failure}{self._output(logged)}")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end(signal.SIGKILL)

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        tool = builder()
        assert tool is not None and tool.built() is not None
        ours, theirs = multiprocessing.Pipe()
        command = f"from {__name__} import serve; serve({theirs.fileno()}, {str(tool.built())!r}, load={self._load})"
        # In the calling thread, so that a call is recorded before the next line runs; one thread, because the machine is shared.
        settings = {"TASK_QUEUE_ENABLE": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", command],
            env={**os.environ, **settings},
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
        return f"\noutput of the contract process:\n{text}" if text else ""


@functools.cache
def shared_process() -> ContractProcess:
    """The process that all tests of this session share unless they ask for a fresh one."""
    process = ContractProcess()
    atexit.register(process.close)
    return process


# ---- the other side: load torch_npu, run what is shipped --------------------------------------------------------------------


def serve(connection_number: int, folder: str, *, load: bool = True) -> None:
    """Body of the contract process: answer requests until the other end closes."""
    connection = Connection(connection_number)
    calls = Calls(load_device(Path(folder)))
    sys.path.append(str(Path(folder) / "site"))
    if load:
        import torch_npu  # noqa: F401, TID251 - loading it is what this process is for
    while True:
        try:
            path, name, arguments, search = connection.recv()
        except EOFError:
            return
        sys.path.extend(entry for entry in search if entry not in sys.path)
        connection.send(_failure_of(path, name, arguments, calls))


def load_device(folder: Path) -> ctypes.CDLL:
    """Load the stub libraries of a build for all to see, as glibc then finds them by name; returns the device's."""
    builds = json.loads((folder / "build.json").read_text())
    loaded = {name: ctypes.CDLL(str(folder / "stubs" / name), ctypes.RTLD_GLOBAL) for name in builds["libraries"]}
    return loaded[DEVICE_LIBRARY]


def _failure_of(path: str, name: str, arguments: Mapping[str, Any], calls: Calls) -> str | None:
    try:
        function = inspect.unwrap(getattr(_module(path), name))
        calls.reset()
        extra = {"calls": calls} if "calls" in inspect.signature(function).parameters else {}
        function(**arguments, **extra)
    except Exception as error:
        return "".join(traceback.format_exception(error)) + _values(error, path)
    return None


def _values(error: Exception, path: str) -> str:
    """Local variables of the innermost frame in the test's own file; printing a tensor's values would launch kernels."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    local = frames[-1].f_locals if frames else {}
    return "".join(f"    {name} = {_description(value)}\n" for name, value in local.items())


def _description(value: object) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return f"Tensor({value.dtype}, {list(value.shape)}, {value.device})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_description, value))}]"
    if isinstance(value, (Call, Calls)):
        return str(value)
    if isinstance(value, (str, int, float, torch.dtype, torch.Size)):
        return repr(value)
    return f"<{type(value).__name__}>"


@functools.cache
def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"contract_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
