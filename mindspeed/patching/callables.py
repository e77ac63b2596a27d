"""Building what is put in the place of a function: plain functions that keep name, signature and picklability."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mindspeed.errors import TargetError
from mindspeed.patching.resolve import Resolved, plain

_ORIGINAL = "__mindspeed_original__"


class Counter(Protocol):
    """Whoever counts the calls of a patch: a row of the ledger."""

    calls: int | None


def original_of(value: Any) -> Any:
    """The function (or descriptor content) that was there before any patch of ours."""
    value = plain(value)
    while hasattr(value, "__dict__") and _ORIGINAL in vars(value):
        value = plain(vars(value)[_ORIGINAL])
    return value


def wrapped(found: Resolved, advice: Callable[..., Any], row: Counter) -> Any:
    """What to store so that `advice(original, ...)` is called instead of the target."""
    if found.kind == "classmethod":
        inner = plain(found.value)

        def classmethod_body(cls: type, *args: Any, **kwargs: Any) -> Any:
            row.calls = (row.calls or 0) + 1
            return advice(types.MethodType(inner, cls), *args, **kwargs)

        return classmethod(_dressed(classmethod_body, inner, found))
    original = _original_callable(found)

    def body(*args: Any, **kwargs: Any) -> Any:
        row.calls = (row.calls or 0) + 1
        return advice(original, *args, **kwargs)

    return _stored_like(found, _dressed(body, plain(found.value), found))


def replaced(found: Resolved, value: Any, row: Counter) -> Any:
    """What to store so that `value` takes the target's place; functions are counted through a plain function."""
    if (
        found.kind in ("class", "data")
        or isinstance(value, (staticmethod, classmethod, property, functools.cached_property))
        or _ORIGINAL in getattr(value, "__dict__", ())  # says itself what it stands for: its identity or its frame matters
    ):
        row.calls = None
        return value

    def body(*args: Any, **kwargs: Any) -> Any:
        row.calls = (row.calls or 0) + 1
        return value(*args, **kwargs)

    return _stored_like(found, _dressed(body, plain(found.value), found))


def _original_callable(found: Resolved) -> Callable[..., Any]:
    """What advice gets to call; for an inherited method, whatever the base class has at the time of the call."""
    original: Callable[..., Any] = plain(found.value)
    if not found.inherited or found.kind != "function" or not isinstance(original, types.FunctionType):
        return original
    owner, attribute = found.owner_object, found.attribute

    @functools.wraps(original)
    def inherited(instance: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, instance), attribute)(*args, **kwargs)

    return inherited


def _dressed(function: Callable[..., Any], original: Any, found: Resolved) -> Any:
    """Give `function` the original's looks, and a name under which pickle finds it where the original had one."""
    functools.update_wrapper(function, original)
    setattr(function, _ORIGINAL, original)
    for mark in [name for name in vars(function) if name.startswith("_torchdynamo")]:
        delattr(function, mark)  # torch.compile would look through the patch at what it says is inside
    if not _reachable(original):
        function.__module__ = found.module
        function.__qualname__ = found.target.partition(":")[2]
    return function


def _reachable(original: Any) -> bool:
    """Whether module and qualified name of a function lead to something, as pickle requires."""
    holder: Any = sys.modules.get(getattr(original, "__module__", None) or "")
    for name in getattr(original, "__qualname__", "<locals>").split("."):
        holder = getattr(holder, name, None)
    return holder is not None


def _stored_like(found: Resolved, function: Any) -> Any:
    """Wrap a function in the descriptor that the target was stored in."""
    if found.kind == "staticmethod":
        return staticmethod(function)
    if found.kind == "classmethod":
        return classmethod(function)
    if isinstance(found.value, property):
        return property(function, found.value.fset, found.value.fdel, found.value.__doc__)
    if isinstance(found.value, functools.cached_property):
        cached = functools.cached_property(function)
        cached.__set_name__(found.owner_object, found.attribute)
        return cached
    return function


def functions_with(found: Resolved, constants: Mapping[Any, Any]) -> list[tuple[types.FunctionType, types.CodeType]]:
    """The functions behind a target whose code holds one of `constants`, each with its new code.

    Decorators hide the function: it is looked for along `__wrapped__` and the original that torch.compile keeps.

    Raises:
        TargetError: the target is no Python function, or a constant occurs nowhere.
    """
    missing = dict(constants)
    rewritten = []
    seen: set[int] = set()
    queue = [original_of(found.value)]
    while queue:
        function = queue.pop(0)
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        queue += [getattr(function, name, None) for name in ("__wrapped__", "_torchdynamo_orig_callable")]
        if isinstance(function, types.FunctionType):
            code, met = _rewritten(function.__code__, constants)
            if met:
                rewritten.append((function, code))
                for constant in met:
                    missing.pop(constant, None)
    if missing:
        raise TargetError(f"{found.target} holds no constant {', '.join(map(repr, missing))} that could be rewritten")
    return rewritten


def _rewritten(code: types.CodeType, constants: Mapping[Any, Any]) -> tuple[types.CodeType, list[Any]]:
    met: list[Any] = []
    constants_of_code = _rewritten_constant(code.co_consts, constants, met)
    return (code.replace(co_consts=constants_of_code) if met else code), met


def _rewritten_constant(value: Any, constants: Mapping[Any, Any], met: list[Any]) -> Any:
    """A constant of a code object with replacements made, in nested functions, tuples and frozensets too."""
    if isinstance(value, types.CodeType):
        code, inner = _rewritten(value, constants)
        met += inner
        return code
    if isinstance(value, (tuple, frozenset)):
        before = len(met)
        items = [_rewritten_constant(item, constants, met) for item in value]
        return type(value)(items) if len(met) > before else value
    for old, new in constants.items():
        if type(old) is type(value) and old == value:  # 1, 1.0 and True are equal but not the same constant
            met.append(old)
            return new
    return value
