"""Ascend NPUs: torch_npu retargets `torch.cuda` itself, this module adds what it leaves out."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from mindspeed.errors import PlatformError
from mindspeed.platform.base import MemoryStats, Platform
from mindspeed.platform.collectives import all_reduce_in
from mindspeed.platform.scope import scoped

if TYPE_CHECKING:
    from mindspeed.patching.ledger import Ledger
    from mindspeed.patching.patch import Patch

logger = logging.getLogger(__name__)

TRANSFER = "torch_npu.contrib.transfer_to_npu"


def _npu() -> Any:
    """The module that torch_npu adds to torch."""
    return vars(torch)["npu"]


class Npu(Platform):
    """Ascend NPUs through torch_npu and hccl."""

    name = "npu"
    device_type = "npu"
    backend = "hccl"
    is_async = True
    kernels = "npu"

    @functools.cached_property
    def _absence(self) -> str:
        version = torch.__version__.partition("+")[0]
        if importlib.util.find_spec("torch_npu") is None:
            return f"torch_npu is not installed; pip install torch-npu=={version} beside CANN"
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            return f"torch_npu does not import ({error}); source CANN's set_env.sh and match torch-npu to torch {version}"
        if _npu().device_count() == 0:
            return "torch_npu is installed but sees no NPU; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
        return ""

    def is_installed(self) -> bool:
        """Whether torch_npu is there, working or not."""
        return importlib.util.find_spec("torch_npu") is not None

    def why_absent(self) -> str:
        """Why there is no NPU to use."""
        return self._absence

    def device(self, index: int | None = None) -> torch.device:
        """The NPU with this index, or the current one."""
        return torch.device("npu", _npu().current_device() if index is None else index)

    def device_count(self) -> int:
        """Number of visible NPUs."""
        return int(_npu().device_count())

    def stream(self) -> Any:
        """A new NPU stream."""
        return _npu().Stream()

    def current_stream(self) -> Any:
        """The current NPU stream."""
        return _npu().current_stream()

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Send the work of a `with` block to `stream`."""
        block: AbstractContextManager[Any] = _npu().stream(stream)
        return block

    def event(self, timing: bool = False) -> Any:
        """A new NPU event."""
        return _npu().Event(enable_timing=timing)

    def synchronize(self) -> None:
        """Wait for all queued work of the current NPU."""
        _npu().synchronize()

    def rng_state(self) -> torch.Tensor:
        """State of the current NPU's generator, uint8."""
        state: torch.Tensor = _npu().get_rng_state()
        return state

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore the current NPU's generator."""
        _npu().set_rng_state(state)

    def memory_stats(self) -> MemoryStats:
        """Counters of the caching allocator."""
        return MemoryStats(
            current=_npu().memory_allocated(),
            peak=_npu().max_memory_allocated(),
            reserved=_npu().memory_reserved(),
            reserved_peak=_npu().max_memory_reserved(),
            total=_npu().get_device_properties(_npu().current_device()).total_memory,
        )

    def reset_peak_memory(self) -> None:
        """Reset the caching allocator's peaks."""
        _npu().reset_peak_memory_stats()

    def _peak_flops(self, dtype: torch.dtype) -> float | None:
        return None  # torch_npu reports no clock or core count to derive it from

    def _limits(self) -> dict[str, str]:
        return {
            "compile": "the host's compiled fusions need Triton for NPUs; plain functions and fused NPU operators are used",
            "fp8": "the host's fp8 recipes need Transformer Engine, which has no NPU build",
        }

    def activate(self, ledger: Ledger) -> None:
        """Import torch_npu's transfer first, which no ledger can undo, then apply what it leaves out."""
        if transfer_to_npu() or not any(row.target == TRANSFER for row in ledger.rows):
            ledger.note(TRANSFER, owner="platform.npu", reason="torch_npu's own retargeting of torch.cuda; stays after revert")
        super().activate(ledger)

    def training_patches(self) -> Iterator[Patch]:
        """megatron.training knows nccl and gloo only when it looks for the device of a signal."""
        from mindspeed.patching.patch import wrap

        target = "megatron.training.dist_signal_handler:get_device"
        yield _owned(wrap(target, _device_of_signals, reason="the backend is hccl"))

    def patches(self) -> Iterator[Patch]:
        """Names of `torch.cuda` that the transfer leaves to CUDA, and the sums that HCCL lacks."""
        from mindspeed.patching.patch import replace, wrap

        for name in ("_lazy_call", "_lazy_init"):
            ours = scoped(getattr(torch.cuda, name), getattr(_npu(), name))
            yield _owned(
                replace(f"torch.cuda:{name}", ours, reason="torch_npu leaves it CUDA's, so the callback would never run")
            )
        yield _owned(replace("torch.cuda:cudart", scoped(torch.cuda.cudart, _no_cudart), reason="there is no CUDA runtime"))
        for name in ("temperature", "power_draw", "clock_rate"):
            ours = scoped(getattr(torch.cuda, name), _zero)
            yield _owned(replace(f"torch.cuda:{name}", ours, reason="read by the straggler detector only"))
        yield _owned(wrap("torch.distributed:all_reduce", _all_reduce_fp64, reason="HCCL cannot sum fp64"))


def _owned(patch: Patch) -> Patch:
    import dataclasses

    return dataclasses.replace(patch, owner="platform.npu")


def _zero(*_args: Any, **_options: Any) -> int:
    """What a sensor that is not there reads."""
    return 0


def _no_cudart(*_args: Any, **_options: Any) -> None:
    raise PlatformError("torch.cuda.cudart needs a CUDA device (platform npu); add --use-pytorch-profiler to --profile")


def _all_reduce_fp64(original: Any, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Sum fp64 tensors of the NPU in fp32, into the caller's own tensor, for every form of the call."""
    if tensor.dtype is not torch.float64 or tensor.device.type != "npu":
        return original(tensor, *args, **options)
    return all_reduce_in(torch.float32, original, tensor, *args, **options)


def _device_of_signals(original: Any, local_rank: int | None = None) -> torch.device:
    """The device whose tensors the process group can gather."""
    if "hccl" not in torch.distributed.get_backend():
        device: torch.device = original(local_rank)
        return device
    return torch.device("npu") if local_rank is None else torch.device("npu", local_rank)


def transfer_to_npu() -> bool:
    """Import torch_npu's own retargeting of torch.cuda, with its banner reduced to one log line; False if it was there."""
    if TRANSFER in sys.modules:
        return False
    with warnings.catch_warnings(record=True) as told:  # drops the filter that the import sets for the whole process, too
        importlib.import_module(TRANSFER)
    logger.info("torch.cuda now means torch.npu (%s, %d notices; not undone by revert)", TRANSFER, len(told))
    return True
