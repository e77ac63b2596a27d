"""Where an object is known by reference: `from x import y` makes names that patching `x.y` alone does not reach.

A place is one such reference: it can be read, written and described. `find` scans module globals, class
dictionaries, defaults of functions and dataclasses, and ModuleSpec trees for given objects, by identity.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mindspeed.patching.resolve import MISSING, Missing

# Libraries that must keep the truth about themselves, or that cannot hold references to a host.
_LEFT_ALONE = frozenset(
    "torch torch_npu torchgen functorch numpy sympy mpmath networkx jinja2 fsspec triton setuptools pkg_resources pip "
    "pytest _pytest pluggy hypothesis pygments rich tensorboard google grpc matplotlib PIL IPython".split()
)
# Of our own modules only those that speak to a host by imported names take part.
_OUR_SPEAKERS = ("mindspeed.training", "mindspeed.host")


@dataclass(frozen=True, eq=False)
class Place:
    """One reference to an object; `put(MISSING)` removes it."""

    container: Any
    key: Any
    text: str

    @property
    def identity(self) -> tuple[int, Any]:
        """Equal for two places that are the same reference."""
        return id(self.container), self.key

    def get(self) -> Any:
        """The object referred to, or MISSING."""
        if isinstance(self.container, (types.ModuleType, type)):
            return vars(self.container).get(self.key, MISSING)
        return getattr(self.container, self.key, MISSING)

    def put(self, value: Any) -> None:
        """Refer to `value` from now on."""
        if value is MISSING:
            delattr(self.container, self.key)
        else:
            setattr(self.container, self.key, value)


class InstancePlace(Place):
    """An attribute stored in an instance, whatever its class has under that name."""

    def get(self) -> Any:
        """The object stored in the instance, or MISSING."""
        return vars(self.container).get(self.key, MISSING)

    def put(self, value: Any) -> None:
        """Store `value` in the instance, frozen or not."""
        if value is MISSING:
            object.__delattr__(self.container, self.key)
        else:
            object.__setattr__(self.container, self.key, value)


class ItemPlace(Place):
    """An entry of a dict."""

    def get(self) -> Any:
        """The entry, or MISSING."""
        return self.container.get(self.key, MISSING)

    def put(self, value: Any) -> None:
        """Write or remove the entry."""
        if value is MISSING:
            del self.container[self.key]
        else:
            self.container[self.key] = value


class DefaultPlace(Place):
    """A default of a function: an int key counts positional defaults, a text names a keyword-only one."""

    def get(self) -> Any:
        """The default."""
        if isinstance(self.key, int):
            return self.container.__defaults__[self.key]
        return self.container.__kwdefaults__[self.key]

    def put(self, value: Any) -> None:
        """Replace the default."""
        if isinstance(self.key, int):
            defaults = list(self.container.__defaults__)
            defaults[self.key] = value
            self.container.__defaults__ = tuple(defaults)
        else:
            self.container.__kwdefaults__[self.key] = value


# Objects that many hold without meaning the same thing by it.
_SHARED_BY_CHANCE = (
    *(type(None), bool, int, float, complex, str, bytes, tuple, frozenset),
    *(types.ModuleType, Missing),
)


def scanned_modules() -> Iterator[types.ModuleType]:
    """Every loaded module whose references are re-pointed: the host, `__main__` and the user's and third-party code."""
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in _LEFT_ALONE or top in sys.stdlib_module_names or not isinstance(module, types.ModuleType):
            continue
        if top == "mindspeed" and not name.startswith(_OUR_SPEAKERS):
            continue
        if id(module) not in seen:  # __mp_main__ is __main__ once more
            seen.add(id(module))
            yield module


def find(objects: Iterable[Any]) -> dict[int, list[Place]]:
    """Places that refer to each of `objects`, by the object's id."""
    wanted = {id(item) for item in objects if can_have_aliases(item)}
    found: dict[int, list[Place]] = {key: [] for key in wanted}
    if not wanted:
        return found
    seen: set[tuple[int, Any]] = set()
    for module in scanned_modules():
        for value, place in _references(module, wanted):
            if place.identity not in seen:
                seen.add(place.identity)
                found[id(value)].append(place)
    return found


def can_have_aliases(value: Any) -> bool:
    """Whether identity says anything: two names bound to 0 or None have nothing to do with each other."""
    return not isinstance(value, _SHARED_BY_CHANCE)


def _references(module: types.ModuleType, wanted: set[int]) -> Iterator[tuple[Any, Place]]:
    name = module.__name__
    for key, value in list(vars(module).items()):
        if id(value) in wanted:
            yield value, Place(module, key, f"{name}.{key}")
        # type(value) and not isinstance: a lazy proxy would load what it stands for when asked for its class.
        if issubclass(type(value), type):
            if value.__module__ == name:
                yield from _in_class(value, wanted, name)
        elif type(value) is types.FunctionType:
            if value.__module__ == name:
                yield from _in_defaults(value, wanted, f"{name}.{key}")
        elif type(value).__name__ == "ModuleSpec" and dataclasses.is_dataclass(value):
            yield from _in_spec(value, wanted, f"{name}.{key}", set())


def _in_class(cls: type, wanted: set[int], module_name: str) -> Iterator[tuple[Any, Place]]:
    text = f"{module_name}.{cls.__qualname__}"
    for key, value in list(vars(cls).items()):
        if id(value) in wanted:
            yield value, Place(cls, key, f"{text}.{key}")
        if type(value) is types.FunctionType:
            yield from _in_defaults(value, wanted, f"{text}.{key}")
        elif issubclass(type(value), type) and value.__qualname__.startswith(cls.__qualname__ + "."):
            yield from _in_class(value, wanted, module_name)
    if "__dataclass_fields__" in vars(cls):
        yield from _in_dataclass(cls, wanted, text)


def _in_dataclass(cls: type, wanted: set[int], text: str) -> Iterator[tuple[Any, Place]]:
    for field in vars(cls)["__dataclass_fields__"].values():
        for key in ("default", "default_factory"):
            value = getattr(field, key)
            if id(value) in wanted:
                yield value, Place(field, key, f"{text}.{field.name} ({key})")
    # A default factory is captured by the generated __init__.
    for cell in getattr(vars(cls).get("__init__"), "__closure__", None) or ():
        value = _contents(cell)
        if id(value) in wanted:
            yield value, Place(cell, "cell_contents", f"{text}.__init__ (captured)")


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty
        return MISSING


def _in_defaults(function: types.FunctionType, wanted: set[int], text: str) -> Iterator[tuple[Any, Place]]:
    for index, value in enumerate(function.__defaults__ or ()):
        if id(value) in wanted:
            yield value, DefaultPlace(function, index, f"{text} (default {index})")
    for key, value in (function.__kwdefaults__ or {}).items():
        if id(value) in wanted:
            yield value, DefaultPlace(function, key, f"{text} (default {key})")


def _in_spec(spec: Any, wanted: set[int], text: str, seen: set[int]) -> Iterator[tuple[Any, Place]]:
    """References inside a ModuleSpec: its module, params and submodules, nested specs included."""
    if id(spec) in seen:
        return
    seen.add(id(spec))
    make: Callable[[Any, Any, str], Place]
    if isinstance(spec, dict):
        make, entries = ItemPlace, list(spec.items())
    else:
        make, entries = Place, [(field.name, getattr(spec, field.name, None)) for field in dataclasses.fields(spec)]
    for key, value in entries:
        if id(value) in wanted:
            yield value, make(spec, key, f"{text}.{key}")
        elif isinstance(value, dict) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            yield from _in_spec(value, wanted, f"{text}.{key}", seen)


def default_places(cls: type, name: str) -> list[Place]:
    """Where a dataclass field's default lives: the class, the Field, and `__init__` of the class and its subclasses."""
    field = cls.__dict__.get("__dataclass_fields__", {}).get(name)
    if field is None or not field.init or field.default is dataclasses.MISSING:
        return []
    places = [Place(field, "default", f"{cls.__qualname__}.{name} (default)")]
    for holder in _with_subclasses(cls):
        init = holder.__dict__.get("__init__")
        if holder.__dict__.get("__dataclass_fields__", {}).get(name) is not field or not isinstance(init, types.FunctionType):
            continue
        positional = init.__code__.co_varnames[: init.__code__.co_argcount]
        text = f"{holder.__qualname__}.__init__ (default {name})"
        if name in positional and init.__defaults__:
            places.append(DefaultPlace(init, positional.index(name) - len(positional) + len(init.__defaults__), text))
        elif name in (init.__kwdefaults__ or {}):
            places.append(DefaultPlace(init, name, text))
    return places


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    below: list[type] = type.__subclasses__(cls)
    for sub in below:
        yield from _with_subclasses(sub)
