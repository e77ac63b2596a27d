"""NVIDIA GPUs: torch as it is; importing mindspeed changes nothing here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from mindspeed.platform.base import MemoryStats, Platform

# Dense matrix-product peaks from the vendor's data sheets, in FLOP/s: 16-bit, TF32/fp32 on matrix cores, fp64.
_PEAKS: dict[str, tuple[float, float, float]] = {
    "V100": (125e12, 15.7e12, 7.8e12),
    "A100": (312e12, 156e12, 19.5e12),
    "A800": (312e12, 156e12, 19.5e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 494e12, 67e12),
    "H800": (989e12, 494e12, 1e12),
    "H200": (989e12, 494e12, 67e12),
    "B200": (2250e12, 1100e12, 40e12),
}


class Cuda(Platform):
    """NVIDIA GPUs through torch.cuda and nccl."""

    name = "cuda"
    device_type = "cuda"
    backend = "nccl"
    is_async = True
    kernels = "triton"

    def why_absent(self) -> str:
        """Why there is no GPU to use."""
        if torch.cuda.is_available():
            return ""
        if not torch.backends.cuda.is_built():
            return (
                f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch or use MINDSPEED_PLATFORM=cpu"
            )
        return "torch sees no NVIDIA GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use MINDSPEED_PLATFORM=cpu"

    def device(self, index: int | None = None) -> torch.device:
        """The GPU with this index, or the current one."""
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def device_count(self) -> int:
        """Number of visible GPUs."""
        return torch.cuda.device_count()

    def stream(self) -> Any:
        """A new CUDA stream."""
        return torch.cuda.Stream()

    def current_stream(self) -> Any:
        """The current CUDA stream."""
        return torch.cuda.current_stream()

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Send the work of a `with` block to `stream`."""
        return torch.cuda.stream(stream)

    def event(self, timing: bool = False) -> Any:
        """A new CUDA event."""
        return torch.cuda.Event(enable_timing=timing)

    def synchronize(self) -> None:
        """Wait for all queued work of the current GPU."""
        torch.cuda.synchronize()

    def rng_state(self) -> torch.Tensor:
        """State of the current GPU's generator, uint8."""
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore the current GPU's generator."""
        torch.cuda.set_rng_state(state)

    def memory_stats(self) -> MemoryStats:
        """Counters of the caching allocator."""
        return MemoryStats(
            current=torch.cuda.memory_allocated(),
            peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            reserved_peak=torch.cuda.max_memory_reserved(),
            total=torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        )

    def reset_peak_memory(self) -> None:
        """Reset the caching allocator's peaks."""
        torch.cuda.reset_peak_memory_stats()

    def _peak_flops(self, dtype: torch.dtype) -> float | None:
        model = torch.cuda.get_device_name()
        for name, (half, single, double) in _PEAKS.items():
            if all(word in model for word in name.split()):
                return {torch.float16: half, torch.bfloat16: half, torch.float32: single, torch.float64: double}.get(dtype)
        return None

    def _limits(self) -> dict[str, str]:
        if torch.cuda.get_device_capability() >= (8, 9):
            return {}
        return {"fp8": f"fp8 needs a GPU of compute capability 8.9 or newer; this is {torch.cuda.get_device_name()}"}
