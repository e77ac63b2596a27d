"""Devices named in calls: "cuda", torch.device("cuda", 1) and 0 mean the CPU, and pinned memory is memory."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.utils._device
import torch.utils.data.dataloader
from torch.compiler import is_compiling

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform.cpu_shims._places import everywhere, method
from mindspeed.platform.scope import mark

LeftAlone = Callable[[FrameType], bool]
_REASON = "a CUDA device named by the host or the user means the CPU"

_FACTORIES = (
    "tensor empty zeros ones full rand randn randint randperm arange range eye linspace logspace normal as_tensor asarray "
    "empty_strided empty_permuted scalar_tensor tril_indices triu_indices sparse_coo_tensor sparse_csr_tensor "
    "sparse_compressed_tensor empty_like zeros_like ones_like full_like rand_like randn_like randint_like "
    "hann_window hamming_window blackman_window bartlett_window kaiser_window set_default_device"
).split()
_TENSOR_METHODS = ("to", "new_tensor", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros")

_NO_DEVICES = frozenset({type(None), torch.dtype, torch.Tensor, torch.nn.Parameter, bool})


def on_cpu(device: Any) -> Any:
    """The CPU for any name of a CUDA device; everything else unchanged."""
    if type(device) in _NO_DEVICES:
        return device
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, int):
        return torch.device("cpu")
    return device


def patches(left_alone: LeftAlone) -> Iterator[Patch]:
    """Factories, conversions, modules, pinned memory, generators and files; not for callers that are left alone."""
    with_device = functools.partial(_with_device, left_alone=left_alone)
    torch.utils._device._device_constructors()  # a cached set of torch's own functions; must not be filled with ours
    for name in _FACTORIES:
        yield from everywhere(name, with_device, "torch", reason=_REASON)
    for name in _TENSOR_METHODS:
        yield method(torch.Tensor, f"torch:Tensor.{name}", with_device, reason=_REASON)
    for name in ("to", "to_empty"):
        yield method(torch.nn.Module, f"torch.nn:Module.{name}", with_device, reason=_REASON)
    yield method(torch.Tensor, "torch:Tensor.cuda", lambda original: mark(tensor_cuda, original), reason=_REASON)
    yield method(torch.nn.Module, "torch.nn:Module.cuda", lambda original: mark(module_cuda, original), reason=_REASON)
    yield method(
        torch.Tensor, "torch:Tensor.pin_memory", lambda original: mark(pin_memory, original), reason="nothing to pin for"
    )
    yield wrap("torch.utils.data.dataloader:DataLoader.__init__", _without_pinning, reason="nothing to pin for")
    yield from everywhere("Generator", _generator_class, "torch", reason=_REASON, unrelated=True)
    yield from everywhere("load", _loading_to_cpu, "torch", "torch.serialization", reason=_REASON)
    context = torch.utils._device.DeviceContext
    yield method(context, "torch.utils._device:DeviceContext.__init__", _first_argument, reason=_REASON)


def _with_device(original: Callable[..., Any], left_alone: LeftAlone) -> Callable[..., Any]:
    """`original` with device and pin_memory arguments brought to the CPU; the common case costs two lookups."""
    name = original.__name__
    place = {"to": 1, "set_default_device": 0}.get(name, sys.maxsize)  # of a device among the positional arguments

    @functools.wraps(original)
    def shim(*args: Any, **options: Any) -> Any:
        changed = _changed(options) if "device" in options or "pin_memory" in options else None
        device = args[place] if len(args) > place else None
        moved = on_cpu(device)
        if changed is None and moved is device:
            return original(*args, **options)
        if not is_compiling() and left_alone(sys._getframe(1)):
            return original(*args, **options)
        if moved is not device:
            args = (*args[:place], moved, *args[place + 1 :])
        return original(*args, **(options if changed is None else changed))

    marked: Callable[..., Any] = mark(shim, original)
    return marked


def _changed(options: dict[str, Any]) -> dict[str, Any] | None:
    """Options that mean the same on a CPU, or None when they already do."""
    device, pinned = options.get("device"), options.get("pin_memory")
    moved = on_cpu(device)
    if moved is device and not pinned:
        return None
    changed = dict(options)
    if moved is not device:
        changed["device"] = moved
    changed.pop("pin_memory", None)
    return changed


def _first_argument(original: Callable[..., Any]) -> Callable[..., Any]:
    """`with torch.device("cuda")`: torch adds the device to factories by itself, so it is changed on the way in."""

    @functools.wraps(original)
    def shim(self: Any, device: Any) -> None:
        original(self, on_cpu(device))

    marked: Callable[..., Any] = mark(shim, original)
    return marked


def tensor_cuda(
    self: torch.Tensor,
    device: Any = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    """The tensor itself, or a copy where another memory format is asked for."""
    return self if memory_format is torch.preserve_format else self.contiguous(memory_format=memory_format)


def module_cuda(self: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    """The module itself."""
    return self


def _without_pinning(original: Callable[..., None], *args: Any, **options: Any) -> None:
    """A DataLoader that is asked to pin does not, instead of warning that it cannot."""
    if options.get("pin_memory"):
        options["pin_memory"] = False
    original(*args, **options)


def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    """The tensor itself."""
    return self


class _IsAGenerator(type):
    """isinstance() and issubclass() against the stand-in answer as against torch's own class."""

    original: type

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.original)


def _generator_class(original: type) -> type:
    def construct(cls: type, device: Any = "cpu") -> Any:
        return original(device=on_cpu(device))

    body = {"__new__": construct, "original": original, "__doc__": original.__doc__, "__module__": original.__module__}
    return _IsAGenerator("Generator", (), body)


def _loading_to_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **options: Any) -> Any:
        return original(f, where_to_load(map_location), *args, **options)

    marked: Callable[..., Any] = mark(load, original)
    return marked


def where_to_load(map_location: Any) -> Any:
    """A map_location that brings to the CPU what a file says, or the caller wants, on a CUDA device."""
    if map_location is None:
        return _tagged_cuda_to_cpu
    if isinstance(map_location, dict):
        return functools.partial(_by_table, map_location)
    if callable(map_location):

        def asked(storage: Any, tag: str) -> Any:
            answer = map_location(storage, tag)
            return _tagged_cuda_to_cpu(storage, tag) if answer is None else answer

        return asked
    return on_cpu(map_location)


def _tagged_cuda_to_cpu(storage: Any, tag: str) -> Any:
    """Storages arrive in host memory; None leaves other devices to torch."""
    return storage if tag.startswith("cuda") else None


def _by_table(table: dict[str, str], storage: Any, tag: str) -> Any:
    device = table.get(tag, tag)
    return storage if on_cpu(device) == "cpu" else torch.serialization.default_restore_location(storage, device)
