"""Mixed precision for "cuda" is mixed precision for the CPU; torch's own bookkeeping per device stays as it is."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.amp.autocast_mode
import torch.amp.grad_scaler

from mindspeed.patching.patch import Patch
from mindspeed.platform.cpu_shims._places import answers, everywhere, method
from mindspeed.platform.cpu_shims.devices import LeftAlone, on_cpu
from mindspeed.platform.scope import mark, original_of, scoped

_REASON = "mixed precision for CUDA means mixed precision for the CPU"


def patches(left_alone: LeftAlone) -> Iterator[Patch]:
    """autocast, GradScaler, the questions about them, and the decorators of autograd functions."""
    device_first = functools.partial(_device_first, left_alone=left_alone)
    autocast, scaler = torch.amp.autocast_mode.autocast, torch.amp.grad_scaler.GradScaler
    yield method(autocast, "torch.amp.autocast_mode:autocast.__init__", device_first, reason=_REASON)
    yield method(scaler, "torch.amp.grad_scaler:GradScaler.__init__", device_first, reason=_REASON)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield from everywhere(name, _asking_for_cpu, "torch", reason=_REASON)
    for name in ("set_autocast_enabled", "set_autocast_dtype"):
        yield from everywhere(name, _setting_for_cpu, "torch", reason=_REASON)
    yield from answers(_old_questions(), "torch", reason=_REASON)
    for name in ("custom_fwd", "custom_bwd"):
        generic = original_of(getattr(torch.amp, name))
        yield from everywhere(name, _decorator, "torch.amp", "torch.amp.autocast_mode", reason=_REASON)
        for_cpu = functools.partial(generic, device_type="cpu")
        yield from everywhere(name, functools.partial(scoped, answer=for_cpu), "torch.cuda.amp", reason=_REASON)


def _old_questions() -> dict[str, Callable[..., Any]]:
    """Names from before devices had names of their own."""
    dtype, set_dtype = original_of(torch.get_autocast_dtype), original_of(torch.set_autocast_dtype)
    return {"get_autocast_gpu_dtype": lambda: dtype("cpu"), "set_autocast_gpu_dtype": lambda new: set_dtype("cpu", new)}


def _device_first(original: Callable[..., Any], left_alone: LeftAlone) -> Callable[..., Any]:
    """A constructor whose first argument is the kind of device; torch.cuda.amp hands on what its user wants."""
    name = "device" if "GradScaler" in original.__qualname__ else "device_type"

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        if not left_alone(sys._getframe(1)):
            if args:
                args = (on_cpu(args[0]), *args[1:])
            else:
                options[name] = on_cpu(options.get(name, "cuda"))
        original(self, *args, **options)

    marked: Callable[..., Any] = mark(__init__, original)
    return marked


def _asking_for_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    return scoped(original, lambda device_type="cuda": original(on_cpu(device_type)))


def _setting_for_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    def setting(*args: Any) -> Any:
        return original(*(("cpu", *args) if len(args) == 1 else (on_cpu(args[0]), *args[1:])))

    return scoped(original, setting)


def _decorator(original: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(fwd: Any = None, *, device_type: str, **options: Any) -> Any:
        return original(fwd, device_type=on_cpu(device_type), **options)

    return scoped(original, decorate)
