"""The vocabulary of changes: what a feature, a repair or a platform asks to be changed in a host.

A patch is data. It names its target as text, `package.module:Class.attribute`, and is resolved, checked
for conflicts and applied by `mindspeed.patching.plan`. `training:name` is a logical target: the function
`name` of whichever training loop is the host (Megatron-LM's or ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Operation(str, Enum):
    """How a target is changed."""

    WRAP = "wrap"  # around advice; stacks
    REPLACE = "replace"  # one owner
    SET = "set"  # plain data, no alias scan
    REWRITE = "rewrite"  # constants inside a function's code
    ADD = "add"  # a new name; an existing one is an error


@dataclass(frozen=True)
class Patch:
    """One change of one target; build it with `wrap`, `replace`, `set_value`, `rewrite` or `add`."""

    operation: Operation
    target: str
    value: Any
    reason: str = ""
    after: tuple[str, ...] = ()  # features whose wrap of the same target must be inside this one; "*" for all others
    supersedes: tuple[str, ...] = ()  # features whose replace, set or rewrite of the same target gives way to this one
    optional: bool = False  # a `training:` target that a program with its own loop may lack
    unrelated: bool = False  # a class may be replaced by one that does not derive from it
    owner: str = field(default="", compare=False)  # filled in by the plan: feature name, "platform.cpu", "repair.x"
    flag: str = field(default="", compare=False)  # the flag that caused it, for people who ask why


def wrap(
    target: str, advice: Callable[..., Any], *, reason: str = "", after: tuple[str, ...] = (), optional: bool = False
) -> Patch:
    """Call `advice(original, *args, **kwargs)` instead of the target.

    Two features that wrap one target must say who is inside: `after=("other-feature",)`, or `after=("*",)`
    for an advice that does not care and goes outside. Patches of layers (`platform.*`, `compat.*`,
    `repair.*`, `host.*`) are inside those of features.

    A `training:` target names a function of the training loop. A program that has a loop of its own lacks
    it; `optional` says that the feature is whole without this patch (reports, figures), otherwise it is refused.

    For a method, `original` is the unbound function and the instance is the first of `args`; for a
    classmethod `original` is bound already, for a staticmethod there is no instance.
    """
    return Patch(Operation.WRAP, target, advice, reason, after=after, optional=optional)


def replace(target: str, value: Any, *, reason: str = "", supersedes: tuple[str, ...] = (), unrelated: bool = False) -> Patch:
    """Put `value` (a function or class) in the place of the target, everywhere it is known by reference.

    A class must be replaced by a subclass of it unless `unrelated`; prefer patching its methods.
    """
    return Patch(Operation.REPLACE, target, value, reason, supersedes=supersedes, unrelated=unrelated)


def set_value(target: str, value: Any, *, reason: str = "", supersedes: tuple[str, ...] = ()) -> Patch:
    """Assign plain data (a guard variable, a cache, a function's `__defaults__`, a dataclass default).

    Only the named attribute changes (for a dataclass default: the field and the generated `__init__` too).
    """
    return Patch(Operation.SET, target, value, reason, supersedes=supersedes)


def rewrite(target: str, constants: Mapping[Any, Any], *, reason: str = "") -> Patch:
    """Replace literals in a function's code; the function object stays, so every reference sees it."""
    return Patch(Operation.REWRITE, target, dict(constants), reason)


def add(target: str, value: Any, *, reason: str = "") -> Patch:
    """Introduce a name that the host does not have."""
    return Patch(Operation.ADD, target, value, reason)
