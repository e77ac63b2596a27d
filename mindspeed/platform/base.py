"""What every platform answers: features, kernels and hosts ask this object and never `torch.cuda`."""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mindspeed.errors import PlatformError

if TYPE_CHECKING:
    from mindspeed.patching.ledger import Ledger
    from mindspeed.patching.patch import Patch

CAPABILITIES: dict[str, str] = {
    "graphs": "capture of a step as a device graph",
    "fp8": "matrix products in 8-bit floating point",
    "pinned_memory": "page-locked host memory",
    "async_copy": "host-device copies that run beside compute",
    "native_avg": "the AVG reduction in every collective",
    "uneven_gather": "list all_gather with a different length on each rank",
    "async_p2p_storage_safe": "a tensor may be released right after isend",
    "compile": "torch.compile of the host's small fusions",
}


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of tensors alive now and at most, bytes held by the allocator, bytes of the whole device."""

    current: int
    peak: int
    reserved: int
    reserved_peak: int
    total: int


class Platform(abc.ABC):
    """One kind of device that one process trains on.

    Class attributes:
        name: "npu", "cuda" or "cpu".
        device_type: what `tensor.device.type` reads.
        backend: the process-group backend that serves this device.
        is_async: whether work is queued; False means that a stream is program order.
        kernels: folder below `mindspeed.ops.kernels` that holds this device's faster bodies, or "".
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    backend: ClassVar[str]
    is_async: ClassVar[bool]
    kernels: ClassVar[str] = ""

    @abc.abstractmethod
    def why_absent(self) -> str:
        """Why this process cannot use the platform, or an empty string when it can."""

    def is_installed(self) -> bool:
        """Whether somebody installed a package for this platform, so that its absence is worth a warning."""
        return False

    def available(self) -> bool:
        """Whether this process can use the platform."""
        return not self.why_absent()

    @abc.abstractmethod
    def device(self, index: int | None = None) -> torch.device:
        """The device with this index, or the one this process works on."""

    @abc.abstractmethod
    def device_count(self) -> int:
        """Number of devices this process can see."""

    @abc.abstractmethod
    def stream(self) -> Any:
        """A stream to queue work on; a context manager as well."""

    @abc.abstractmethod
    def current_stream(self) -> Any:
        """The stream that work goes to now."""

    @abc.abstractmethod
    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Send the work of a `with` block to `stream`."""

    @abc.abstractmethod
    def event(self, timing: bool = False) -> Any:
        """A marker with record, wait, synchronize, query and, when timed, elapsed_time."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait for all queued work."""

    @abc.abstractmethod
    def rng_state(self) -> torch.Tensor:
        """State of the device's random stream, a uint8 tensor."""

    @abc.abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore a state that `rng_state` returned on the same kind of platform."""

    def host_rng(self) -> AbstractContextManager[None]:
        """Draw from the host's random stream inside a `with` block; it is the CPU generator unless the device uses that."""
        return contextlib.nullcontext()

    def host_rng_state(self) -> torch.Tensor:
        """State of the host's random stream, a uint8 tensor."""
        return torch.get_rng_state()

    def set_host_rng_state(self, state: torch.Tensor) -> None:
        """Restore a state that `host_rng_state` returned."""
        torch.set_rng_state(state)

    @abc.abstractmethod
    def memory_stats(self) -> MemoryStats:
        """Memory counters of this process's device."""

    @abc.abstractmethod
    def reset_peak_memory(self) -> None:
        """Let the peak counters start again from the current values."""

    @abc.abstractmethod
    def _peak_flops(self, dtype: torch.dtype) -> float | None:
        """Known or measured peak of this device."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Floating-point operations per second of one device in dense matrix products, None when unknown.

        The environment variable MINDSPEED_PEAK_TFLOPS overrides the built-in figure.
        """
        if told := os.environ.get("MINDSPEED_PEAK_TFLOPS"):
            try:
                return float(told) * 1e12
            except ValueError:
                raise PlatformError(f"MINDSPEED_PEAK_TFLOPS={told} is not a number; give teraflops, e.g. 312") from None
        return self._peak_flops(dtype)

    @abc.abstractmethod
    def _limits(self) -> dict[str, str]:
        """Capability -> the sentence that says why it is missing here."""

    def why_not(self, capability: str) -> str:
        """The sentence that says why `capability` is missing here, or an empty string when it is present.

        Raises:
            KeyError: no such capability; there are the keys of `CAPABILITIES` and `fused:<op>`.
        """
        if capability.startswith("fused:"):
            return self._why_not_fused(capability.removeprefix("fused:"))
        if capability not in CAPABILITIES:
            raise KeyError(f"no capability {capability!r}; there are {', '.join(CAPABILITIES)} and fused:<op>")
        return self._limits().get(capability, "")

    def supports(self, capability: str) -> bool:
        """Whether the platform has `capability`."""
        return not self.why_not(capability)

    def _why_not_fused(self, op: str) -> str:
        """A fused body exists when the platform's kernel folder has a file with the operator's name."""
        module = f"mindspeed.ops.kernels.{self.kernels}.{op}"
        try:
            found = bool(self.kernels) and importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        return "" if found else f"mindspeed has no fused {op} kernel for platform {self.name}; the plain torch body is used"

    def patches(self) -> Iterator[Patch]:
        """Everything of torch that this platform replaces, for the ledger."""
        return iter(())

    def training_patches(self) -> Iterator[Patch]:
        """What this platform changes in megatron.training, for the host that has it."""
        return iter(())

    def activate(self, ledger: Ledger) -> None:
        """Apply the platform's patches; a second call does nothing. Kernels load at the first call that needs them."""
        from mindspeed.patching.plan import Plan

        owner = f"platform.{self.name}"
        if not any(row.owner == owner and row.operation != "permanent" for row in ledger.rows):
            Plan.of(self.patches()).apply(ledger)

    def describe(self) -> str:
        """One line for the start-up log."""
        return f"platform {self.name} ({self.device_count()} device(s), backend {self.backend}), torch {torch.__version__}"

    def __repr__(self) -> str:
        return f"<mindspeed platform {self.name}>"
