"""Run megatron-core's fused functions as plain Python off CUDA.

`jit_fuser` is `torch.compile` in megatron-core. On CPU and NPU it costs seconds and a compiler per process
for functions that our operators or the eager kernels replace, so it becomes the identity there; functions
decorated before we came are unwrapped.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from mindspeed.patching.patch import Patch, replace, set_value
from mindspeed.platform import Platform

HOST = "megatron."
_WHY = "torch.compile costs seconds per process and gains nothing off CUDA"


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Identity decorator that stands in for `jit_fuser`."""
    return function


@contextlib.contextmanager
def not_compiling(platform: Platform) -> Iterator[None]:
    """Import host modules under this, and their `@jit_fuser` functions are born plain.

    Only callers in the host see it: everybody else's `torch.compile` keeps working meanwhile.
    """
    if platform.name == "cuda":
        yield
        return
    compile_ = torch.compile

    @functools.wraps(compile_)
    def compile_for_others(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(HOST) and len(args) == 1 and not kwargs:
            return args[0]
        return compile_(*args, **kwargs)

    torch.compile = compile_for_others
    try:
        yield
    finally:
        torch.compile = compile_
        core_jit = sys.modules.get("megatron.core.jit")
        if core_jit is not None and core_jit.jit_fuser is compile_for_others:
            _forget(compile_for_others, compile_)


def _forget(stand_in: Any, original: Any) -> None:
    """Put torch's function back where host modules imported the stand-in by name."""
    for module in _host_modules():
        if vars(module).get("jit_fuser") is stand_in:
            vars(module)["jit_fuser"] = original


def _host_modules() -> list[ModuleType]:
    return [module for name, module in tuple(sys.modules.items()) if name.startswith(HOST) and module is not None]


def patches(platform: Platform) -> Iterator[Patch]:
    """Make `jit_fuser` the identity and unwrap what it has compiled already."""
    if platform.name == "cuda":
        return
    for module in _host_modules():
        if "jit_fuser" in vars(module):
            yield set_value(f"{module.__name__}:jit_fuser", plain, reason=_WHY)
    for target, original in compiled_functions():
        yield replace(target, original, reason=_WHY)


def compiled_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Targets in the host that hold a `torch.compile` wrapper, with the function below it."""
    for module in _host_modules():
        for name, value in tuple(vars(module).items()):
            original = _below(value)
            if original is not None and original.__module__ == module.__name__:
                yield f"{module.__name__}:{name}", original
            if isinstance(value, type) and value.__module__ == module.__name__:
                for attribute, member in tuple(vars(value).items()):
                    original = _below(member)
                    if original is not None:
                        yield f"{module.__name__}:{value.__qualname__}.{attribute}", original


def _below(value: Any) -> Callable[..., Any] | None:
    """The function that torch.compile wrapped, or None."""
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    return attributes.get("_torchdynamo_orig_callable")
