"""From the text of a target to the thing it names, seen as it is stored and not as attribute access shows it.

`package.module:Class.method` says where the module ends; the dotted form `package.module.Class.method`
is accepted and split by importing the longest prefix that exists.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed.errors import TargetError


class Missing:
    """Type of `MISSING`, which stands for an attribute that does not exist."""

    def __repr__(self) -> str:
        return "<missing>"


MISSING = Missing()


@dataclass(frozen=True, eq=False)
class Resolved:
    """What a target names.

    Attributes:
        target: canonical text, `module:qualname`.
        owner_object: the module, class or other object that holds the attribute.
        attribute: its name there.
        value: the stored object (a staticmethod, classmethod or property object where it is one), or MISSING.
        kind: "function", "class", "staticmethod", "classmethod", "property", "data" or "missing".
        module: name of the module that the target names.
        inherited: True where the value comes from a base class of the owner.
    """

    target: str
    owner_object: Any
    attribute: str
    value: Any
    kind: str
    module: str
    inherited: bool = False

    @property
    def plain(self) -> Any:
        """The function inside a staticmethod, classmethod or property; otherwise the value itself."""
        return plain(self.value)


def plain(value: Any) -> Any:
    """The function inside a staticmethod, classmethod, property or cached property; otherwise `value`."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return value


def resolve(target: str, *, allow_missing: bool = False, originals: Mapping[int, type] | None = None) -> Resolved:
    """Find what `target` names, importing its module.

    Args:
        target: `package.module:qualname` or `package.module.qualname`.
        allow_missing: answer kind "missing" when only the last name is absent.
        originals: id of a class that stands in for another -> the class it replaced; names below a
            replaced class are looked up in the class it replaced.

    Raises:
        TargetError: no such module or attribute, or importing the module fails.
    """
    module, names = _split(target)
    owner: Any = module
    for name in names[:-1]:
        owner = _static(owner, name)
        if owner is MISSING:
            raise TargetError(f"{target} does not exist: {module.__name__} has no {'.'.join(names)}")
        owner = plain(owner)
        owner = (originals or {}).get(id(owner), owner)
    attribute = names[-1]
    value = _static(owner, attribute)
    canonical = f"{module.__name__}:{'.'.join(names)}"
    if value is MISSING and not allow_missing:
        raise TargetError(f"{canonical} does not exist: {_describe(owner)} has no attribute {attribute!r}")
    inherited = isinstance(owner, type) and value is not MISSING and attribute not in vars(owner)
    return Resolved(canonical, owner, attribute, value, _kind(value, attribute, owner), module.__name__, inherited)


def load(target: str) -> Any:
    """The object a target names, as attribute access shows it (bound, for a classmethod)."""
    found = resolve(target)
    return getattr(found.owner_object, found.attribute)


def _split(target: str) -> tuple[types.ModuleType, list[str]]:
    """Import the module of a target; the rest are attribute names."""
    module_name, colon, qualname = target.partition(":")
    if colon:
        names = qualname.split(".")
        module = _import(module_name, target)
        if module is None:
            raise TargetError(f"{target} does not exist: there is no module {module_name}")
    else:
        parts = target.split(".")
        for count in range(len(parts) - 1, 0, -1):
            module = _import(".".join(parts[:count]), target)
            if module is not None:
                names = parts[count:]
                break
        else:
            raise TargetError(f"{target} does not exist: there is no module {parts[0]}")
    if not all(name.isidentifier() for name in names):
        raise TargetError(f"{target!r} is not of the form package.module:name.name")
    return module, names


def _import(name: str, target: str) -> types.ModuleType | None:
    """The module, or None when it does not exist; a module that exists but fails to import is an error of its own."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise TargetError(f"{target}: importing {name} failed, because it needs {error.name!r}, which is absent") from error
    except ImportError as error:
        raise TargetError(f"{target}: importing {name} failed: {error}") from error


def _static(owner: Any, name: str) -> Any:
    """Stored value of an attribute, without running descriptors."""
    if isinstance(owner, (types.ModuleType, type)):
        found = inspect.getattr_static(owner, name, MISSING)
        if found is not MISSING or isinstance(owner, type):
            return found
    return getattr(owner, name, MISSING)  # modules with __getattr__; functions' __defaults__ and the like


def _kind(value: Any, attribute: str, owner: Any) -> str:
    if value is MISSING:
        return "missing"
    if isinstance(value, staticmethod) or (attribute == "__new__" and isinstance(owner, type)):
        return "staticmethod"
    if isinstance(value, classmethod):
        return "classmethod"
    if isinstance(value, (property, functools.cached_property)):
        return "property"
    if isinstance(value, type):
        return "class"
    if inspect.isroutine(value) or (callable(value) and hasattr(value, "__wrapped__")):
        return "function"
    return "data"


def _describe(owner: Any) -> str:
    if isinstance(owner, types.ModuleType):
        return f"module {owner.__name__}"
    return f"{getattr(owner, '__module__', '?')}.{getattr(owner, '__qualname__', type(owner).__name__)}"
