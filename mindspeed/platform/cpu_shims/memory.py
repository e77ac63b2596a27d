"""Memory counters: live tensor bytes stand for the allocator's, the resident set for what it reserved."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil

from mindspeed.patching.patch import Patch
from mindspeed.platform.cpu_shims._places import answer, answers
from mindspeed.platform.memory import resident_bytes, resident_peak_bytes

if TYPE_CHECKING:
    from mindspeed.platform.memory import LiveMemoryCounter


def patches(memory: LiveMemoryCounter) -> Iterator[Patch]:
    """Counters of `torch.cuda` and `torch.cuda.memory`."""
    yield from answers(_table(memory), "torch.cuda", "torch.cuda.memory", reason="tensors live in host memory")


def _table(memory: LiveMemoryCounter) -> dict[str, Callable[..., Any]]:
    def allocated(device: Any = None) -> int:
        return memory.read().current

    def most_allocated(device: Any = None) -> int:
        return memory.read().peak

    def reset(device: Any = None) -> None:
        memory.reset_peak()

    def stats(device: Any = None) -> OrderedDict[str, int]:
        return memory_stats(memory)

    def summary(device: Any = None, abbreviated: bool = False) -> str:
        return "\n".join(f"{key:40s} {value:>20,d}" for key, value in memory_stats(memory).items())

    return {
        "memory_allocated": allocated,
        "max_memory_allocated": most_allocated,
        "memory_reserved": lambda device=None: resident_bytes(),
        "memory_cached": lambda device=None: resident_bytes(),
        "max_memory_reserved": lambda device=None: resident_peak_bytes(),
        "max_memory_cached": lambda device=None: resident_peak_bytes(),
        "memory_stats": stats,
        "memory_stats_as_nested_dict": lambda device=None: nested(memory_stats(memory)),
        "memory_summary": summary,
        "mem_get_info": _free_and_total,
        "reset_peak_memory_stats": reset,
        "reset_max_memory_allocated": reset,
        "reset_max_memory_cached": reset,
        "reset_accumulated_memory_stats": answer(None),
        "set_per_process_memory_fraction": answer(None),
        "empty_cache": answer(None),
    }


def memory_stats(memory: LiveMemoryCounter) -> OrderedDict[str, int]:
    """The entries of torch.cuda.memory_stats that hosts read; bytes, and the number of live storages."""
    read = memory.read()
    return OrderedDict(
        {
            "allocated_bytes.all.current": read.current,
            "allocated_bytes.all.peak": read.peak,
            "allocation.all.current": read.storages,
            "reserved_bytes.all.current": resident_bytes(),
            "reserved_bytes.all.peak": resident_peak_bytes(),
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }
    )


def nested(flat: OrderedDict[str, int]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def _free_and_total(device: Any = None) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total
