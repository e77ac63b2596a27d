"""Finding features: every subclass of `Feature` defined in a module of `mindspeed.core`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from mindspeed.patching.feature import Feature


@functools.cache
def all_features(package: str = "mindspeed.core") -> tuple[Feature, ...]:
    """One instance of every feature below a package, by name.

    Raises:
        TypeError: two features have the same name.
    """
    features: dict[str, Feature] = {}
    for module in _modules(package):
        for feature in features_of(module):
            if feature.name in features:
                other = type(features[feature.name]).__module__
                raise TypeError(f"two features are called {feature.name!r}: in {other} and in {module.__name__}")
            features[feature.name] = feature
    return tuple(features[name] for name in sorted(features))


def features_of(module: ModuleType) -> Iterator[Feature]:
    """Features defined (not merely imported) in a module; a leading underscore marks a base of others."""
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Feature) and value.__module__ == module.__name__:
            if not value.__name__.startswith("_"):
                yield value()


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    yield root
    for info in sorted(pkgutil.walk_packages(root.__path__, prefix=f"{package}."), key=lambda info: info.name):
        yield importlib.import_module(info.name)
