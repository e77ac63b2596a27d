"""Plain CPUs with gloo: host code that speaks of `torch.cuda` runs unchanged, in program order."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import psutil
import torch

from mindspeed.errors import PlatformError
from mindspeed.platform.base import MemoryStats, Platform
from mindspeed.platform.host_random import HostRandomStream
from mindspeed.platform.memory import LiveMemoryCounter, resident_bytes, resident_peak_bytes
from mindspeed.platform.streams import ProgramOrderEvent, ProgramOrderStream, on_stream

if TYPE_CHECKING:
    from mindspeed.patching.patch import Patch

_WHY_NOT: dict[str, str] = {
    "graphs": "graph capture needs a CUDA or NPU device (platform cpu)",
    "fp8": "fp8 matrix products need a CUDA or NPU device (platform cpu)",
    "pinned_memory": "pinned memory needs a CUDA or NPU device (platform cpu)",
    "async_copy": "on platform cpu host and device memory are the same, nothing is copied",
    "native_avg": "gloo of some torch versions ignores or refuses AVG; mindspeed.platform.collectives probes and emulates it",
    "uneven_gather": "gloo has no all_gather of unequal lengths; mindspeed.platform.collectives emulates it",
    "async_p2p_storage_safe": "gloo reads a tensor after isend returned; keep it alive until the send has completed",
    "compile": "the host's small compiled fusions cost seconds of compilation and gain nothing on platform cpu",
}


class Cpu(Platform):
    """CPUs with gloo; `torch.cuda` names are retargeted, except `is_available()`, which stays False."""

    name = "cpu"
    device_type = "cpu"
    backend = "gloo"
    is_async = False

    @staticmethod
    def hide_gpus() -> None:
        """Make visible GPUs invisible to this process, before CUDA starts, so that torch itself sees a CPU machine.

        Raises:
            PlatformError: CUDA has been initialised already.
        """
        if torch.cuda.is_initialized():
            raise PlatformError(
                "MINDSPEED_PLATFORM=cpu: CUDA is already initialised in this process. "
                "Import mindspeed before anything touches the GPU, or start with CUDA_VISIBLE_DEVICES=''."
            )
        if torch.backends.cuda.is_built():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def why_absent(self) -> str:
        """A CPU is always there; a visible GPU rules this platform out, since torch would prefer the GPU."""
        if torch.cuda.is_available():
            return "torch still sees a GPU; start with CUDA_VISIBLE_DEVICES=''"
        return ""

    def device(self, index: int | None = None) -> torch.device:
        """The CPU, whatever the index."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """One."""
        return 1

    def stream(self) -> ProgramOrderStream:
        """The stream; there is only program order."""
        return ProgramOrderStream()

    def current_stream(self) -> ProgramOrderStream:
        """The stream; there is only program order."""
        return ProgramOrderStream()

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A block that runs in program order."""
        return on_stream(stream)

    def event(self, timing: bool = False) -> ProgramOrderEvent:
        """A marker of wall-clock time."""
        return ProgramOrderEvent(enable_timing=timing)

    def synchronize(self) -> None:
        """Nothing is queued."""

    def rng_state(self) -> torch.Tensor:
        """State of the default generator, uint8 [5056]; it serves as the device's stream."""
        return torch.default_generator.get_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore the default generator."""
        torch.default_generator.set_state(state)

    @functools.cached_property
    def host_stream(self) -> HostRandomStream:
        """The host's random stream of this process."""
        return HostRandomStream()

    def host_rng(self) -> AbstractContextManager[None]:
        """Draw from the host's stream: the default generator holds its state inside the block."""
        return self.host_stream.drawing()

    def host_rng_state(self) -> torch.Tensor:
        """State of the host's stream, uint8 [5056]."""
        return self.host_stream.state()

    def set_host_rng_state(self, state: torch.Tensor) -> None:
        """Restore the host's stream."""
        self.host_stream.set_state(state)

    @functools.cached_property
    def memory(self) -> LiveMemoryCounter:
        """Counter behind the memory questions of this process."""
        return LiveMemoryCounter()

    def memory_stats(self) -> MemoryStats:
        """Bytes of live tensors (see `mindspeed.platform.memory`) and of the resident set."""
        read = self.memory.read()
        return MemoryStats(read.current, read.peak, resident_bytes(), resident_peak_bytes(), psutil.virtual_memory().total)

    def reset_peak_memory(self) -> None:
        """Let the peak start from what is alive now."""
        self.memory.reset_peak()

    def _peak_flops(self, dtype: torch.dtype) -> float | None:
        return _measured_peak_flops(dtype)

    def _limits(self) -> dict[str, str]:
        return _WHY_NOT

    def patches(self) -> Iterator[Patch]:
        """The shims of `torch.cuda`, of the factories, of the random streams and of torch.distributed."""
        from mindspeed.platform.cpu_shims import shims

        return shims(self)


@functools.cache
def _measured_peak_flops(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    """Best of a few square matrix products with the threads torch uses now; a data sheet knows no thread count."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
