"""Who is asking: torch gets torch's own answers, the host and the user get the platform's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# Modules of torch that only hand on what their caller said; a device they name was named by the user.
_HANDS_ON = ("torch.nn.", "torch.optim.", "torch.cuda.amp.")


def asked_by_torch(frame: FrameType) -> bool:
    """Whether the code of `frame` is torch's own."""
    name: str = frame.f_globals.get("__name__", "")
    return name.startswith("torch.") or name == "torch"


def decided_by_torch(frame: FrameType) -> bool:
    """Whether torch itself, not a layer that hands on its caller's wish, named the device."""
    return asked_by_torch(frame) and not frame.f_globals["__name__"].startswith(_HANDS_ON)


def decided_outside_the_host(frame: FrameType) -> bool:
    """Whether neither the host nor we, directly or through a layer of torch, named the device."""
    name: str = frame.f_globals.get("__name__", "")
    return not name.startswith(("megatron.", "mindspeed.", *_HANDS_ON))


def scoped(original: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer` for the host and the user, `original` for torch; looks like `original`.

    Inductor, for one, asks for properties of a CUDA device without asking whether there is one.
    """
    original = original_of(original)

    @functools.wraps(original)
    def shim(*args: Any, **options: Any) -> Any:
        if asked_by_torch(sys._getframe(1)):
            return original(*args, **options)
        return answer(*args, **options)

    marked: Callable[..., Any] = mark(shim, original)
    return marked


def mark(shim: Any, original: Any) -> Any:
    """Remember what `shim` stands for, so that shims are never stacked on shims."""
    shim.__mindspeed_original__ = original
    return shim


def original_of(value: Any) -> Any:
    """torch's own object behind a shim, or `value` itself."""
    return getattr(value, "__mindspeed_original__", value)
