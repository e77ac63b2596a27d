"""Building the patches of one name that torch offers in several modules."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mindspeed.patching.patch import Patch, replace
from mindspeed.platform.scope import original_of, scoped


def everywhere(name: str, make: Callable[[Any], Any], *modules: str, reason: str, unrelated: bool = False) -> Iterator[Patch]:
    """Replace `name` in each of `modules` that has it.

    Args:
        make: from torch's own object to what replaces it; called once for each different object.
        unrelated: for classes, whether the new one need not derive from the old.
    """
    made: dict[int, Any] = {}
    for module in modules:
        original = original_of(getattr(sys.modules.get(module), name, None))
        if original is None:  # this torch does not have the name
            continue
        if id(original) not in made:
            made[id(original)] = make(original)
        yield replace(f"{module}:{name}", made[id(original)], reason=reason, unrelated=unrelated)


def method(owner: type, path: str, make: Callable[[Any], Any], *, reason: str) -> Patch:
    """Replace the method that `path`, `module:Class.name`, names; `owner` is that class."""
    original = original_of(getattr(owner, path.rpartition(".")[2]))
    return replace(path, make(original), reason=reason)


def answers(table: dict[str, Callable[..., Any]], *modules: str, reason: str) -> Iterator[Patch]:
    """Replace each name of `table` by a function that torch itself does not get to see (see `scoped`)."""
    for name, ours in table.items():
        yield from everywhere(name, functools.partial(scoped, answer=ours), *modules, reason=reason)


def answer(value: Any) -> Callable[..., Any]:
    """A function that returns `value` whatever it is asked."""
    return lambda *_args, **_options: value


def instead(ours: Any) -> Callable[[Any], Any]:
    """`ours`, whatever torch's own object is."""
    return lambda _original: ours


def the_cpu(*_args: Any, **_options: Any) -> torch.device:
    """The device every question for a device is answered with."""
    return torch.device("cpu")
