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

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from mindspeed.testing.shipped import Place, Process, shared_process, shipped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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

    def __str__(self) -> str:
        return f"Calls[{', '.join(map(str, self))}]"


def npu_contract(*, fresh: bool = False, load: bool = True, seconds: float = 60.0) -> Callable[[Callable[..., None]], Any]:
    """Decorate a test so that its body runs on the emulated NPU; marks it `npu_contract`.

    fresh: in a new process, for tests that change torch in ways that cannot be undone. load: import torch_npu first (False
    needs fresh: for tests of whoever imports it). seconds: the process is ended, with its stacks shown, after that time.
    The test is skipped, with the reason, where the environment cannot be made; see `unavailable`.
    """
    if not load and not fresh:
        raise ValueError("npu_contract: load=False needs fresh=True, because other tests have loaded torch_npu by then.")

    def process() -> Process:
        return Process(place(load)) if fresh else shared_process("contract", place)

    def decorate(function: Callable[..., None]) -> Any:
        import pytest

        test = shipped(function, process, unavailable, {"calls"}, seconds=seconds, keep=not fresh)
        return pytest.mark.npu_contract(test)

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


def place(load: bool = True) -> Place:
    """The process with the emulated device; kernels are issued in the calling thread, so that they are recorded at once."""
    tool = builder()
    assert tool is not None
    environment = {"TASK_QUEUE_ENABLE": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return Place("contract", f"{__name__}:prepare", environment, (str(tool.build()), "load" if load else ""))


# ---- for bodies of tests ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hccl_world(size: int = 1) -> Iterator[ProcessGroup]:
    """An hccl group in which this process is rank 0 of `size`; the other ranks do not exist, collectives succeed at once."""
    import torch.distributed as dist

    dist.init_process_group("hccl", store=dist.HashStore(), rank=0, world_size=size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def older_torch_npu(*absent: str, **without: Sequence[str]) -> Iterator[None]:
    """Inside the block torch_npu lacks the operators `absent`, and others lack keyword arguments, as older versions do.

        older_torch_npu("npu_ring_attention_update", npu_fusion_attention_v2=("softmax_layout", "sink"))

    Schemas tell so, and calling an absent operator or passing an absent argument fails, as it does with the older version.
    """
    import torch
    import torch_npu  # noqa: TID251 - only the process with the emulated device gets here

    from mindspeed.ops.kernels.npu import _versions

    def forget() -> None:
        _versions.offers.cache_clear()
        _versions._parameters.cache_clear()

    operators = {name: _WithoutArguments(getattr(torch.ops.npu, name), tuple(names)) for name, names in without.items()}
    with contextlib.ExitStack() as stack:
        stack.callback(forget)
        stack.enter_context(mock.patch.object(torch.ops, "npu", _Namespace(torch.ops.npu, operators, absent)))
        for name, operator in operators.items():
            stack.enter_context(mock.patch.object(torch_npu, name, operator))
        for name in absent:
            stack.enter_context(mock.patch.object(torch_npu, name))
            delattr(torch_npu, name)
        forget()
        yield


class _WithoutArguments:
    """An operator whose schema ends before some of its keyword arguments came."""

    def __init__(self, operator: Any, names: tuple[str, ...]) -> None:
        self._operator, self._names = operator, names
        arguments = [argument for argument in operator.default._schema.arguments if argument.name not in names]
        self.default = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))

    def __call__(self, *args: object, **kwargs: object) -> object:
        if unknown := sorted(set(self._names) & set(kwargs)):
            raise TypeError(f"{self._operator} of this version has no argument {unknown[0]}")
        return self._operator(*args, **kwargs)


class _Namespace:
    """`torch.ops.npu` with some operators replaced and some absent."""

    def __init__(self, namespace: Any, operators: Mapping[str, object], absent: Sequence[str]) -> None:
        self._namespace, self._operators, self._absent = namespace, operators, absent

    def __getattr__(self, name: str) -> object:
        if name in self._absent:
            raise AttributeError(f"this version has no operator npu::{name}")
        return self._operators[name] if name in self._operators else getattr(self._namespace, name)


# ---- the other side: load torch_npu, run what is shipped --------------------------------------------------------------------


def prepare(folder: str, load: str) -> dict[str, Calls]:
    """Set the process up: stub libraries, torch_npu on the search path and, if asked, imported."""
    calls = Calls(load_device(Path(folder)))
    sys.path.append(str(Path(folder) / "site"))
    if load:
        import torch_npu  # noqa: F401, TID251 - loading it is what this process is for
    return {"calls": calls}


def load_device(folder: Path) -> ctypes.CDLL:
    """Load the stub libraries of a build for all to see, as glibc then finds them by name; returns the device's."""
    builds = json.loads((folder / "build.json").read_text())
    loaded = {name: ctypes.CDLL(str(folder / "stubs" / name), ctypes.RTLD_GLOBAL) for name in builds["libraries"]}
    return loaded[DEVICE_LIBRARY]
