"""Questions about devices: `torch.cuda.current_device()` and its like mean the CPU."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import psutil
import torch
import torch.cuda.nvtx

from mindspeed.errors import PlatformError
from mindspeed.patching.patch import Patch
from mindspeed.platform.cpu_shims._places import answer, answers, everywhere, instead, the_cpu

# Hosts gate fused paths on capability 8; nothing is gated from above.
_CAPABILITY = (8, 0)

_REFUSED = {
    "cudart": "--profile without --use-pytorch-profiler",
    "graph_pool_handle": "--enable-cuda-graph and --external-cuda-graph",
    "make_graphed_callables": "--enable-cuda-graph and --external-cuda-graph",
    "memory_snapshot": "--record-memory-history",
    "_record_memory_history": "--record-memory-history",
    "_snapshot": "--record-memory-history",
    "_dump_snapshot": "--record-memory-history",
}


def patches() -> Iterator[Patch]:
    """Device questions, what cannot be had on a CPU, sensors and profiler marks."""
    yield from answers(_DEVICE_QUESTIONS, "torch.cuda", reason="one CPU is the only device")
    yield from everywhere("device", instead(DeviceBlock), "torch.cuda", reason="there is nothing to select", unrelated=True)
    yield from everywhere("device_of", instead(DeviceBlock), "torch.cuda", reason="there is nothing to select", unrelated=True)
    sensors = ("utilization", "temperature", "power_draw", "clock_rate", "memory_usage", "device_memory_used")
    yield from answers(dict.fromkeys(sensors, answer(0)), "torch.cuda", reason="there is no sensor")
    marks: dict[str, Callable[..., Any]] = dict.fromkeys(("range_push", "range_pop", "range_start"), answer(0))
    marks |= {"range_end": answer(None), "mark": answer(None), "range": lambda *_a, **_o: contextlib.nullcontext()}
    yield from answers(marks, "torch.cuda.nvtx", reason="no profiler listens")
    for name, flag in _REFUSED.items():
        yield from answers(
            {name: _refuse(name, flag)}, "torch.cuda", "torch.cuda.memory", "torch.cuda.graphs", reason="refused"
        )
    for name in ("CUDAGraph", "graph"):
        refused = _refused_class(name, "--enable-cuda-graph and --external-cuda-graph")
        yield from everywhere(name, instead(refused), "torch.cuda", "torch.cuda.graphs", reason="refused", unrelated=True)


class DeviceBlock:
    """`with torch.cuda.device(...)`: there is one device, so nothing changes."""

    def __init__(self, device: Any = None) -> None:
        self.idx = 0
        self.prev_idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_error: object) -> None:
        return None


def device_properties(device: Any = None) -> types.SimpleNamespace:
    """What hosts read of a device: name, capability, total_memory (bytes of physical memory), multi_processor_count."""
    major, minor = _CAPABILITY
    return types.SimpleNamespace(
        name="cpu",
        major=major,
        minor=minor,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=torch.get_num_threads(),
    )


def _refuse(name: str, flag: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_options: Any) -> NoReturn:
        raise PlatformError(f"torch.cuda.{name} needs a CUDA device (platform cpu); remove {flag}")

    return refuse


def _refused_class(name: str, flag: str) -> type:
    refuse = _refuse(name, flag)

    def construct(cls: type, *_args: Any, **_options: Any) -> NoReturn:
        refuse()

    return type(name, (), {"__new__": construct, "__module__": __name__, "__doc__": "Refused on platform cpu."})


_DEVICE_QUESTIONS: dict[str, Callable[..., Any]] = {
    "current_device": the_cpu,  # no index: the host hands it on as `device=`
    "device_count": answer(1),
    "set_device": answer(None),
    "synchronize": answer(None),
    "init": answer(None),
    "ipc_collect": answer(None),
    "get_device_name": answer("cpu"),
    "get_device_capability": answer(_CAPABILITY),
    "get_device_properties": device_properties,
    "can_device_access_peer": answer(False),
    "is_bf16_supported": answer(True),
    "is_current_stream_capturing": answer(False),
    "get_sync_debug_mode": answer(0),
    "set_sync_debug_mode": answer(None),
}
