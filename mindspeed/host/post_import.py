"""Act on a package once it can be imported, even when our import stands in the middle of that package's own."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_importable(package: str, last_module: str, action: Callable[[], None]) -> None:
    """Run `action` now, or after `last_module` has been executed if `package` is being imported at this moment."""
    if is_being_imported(package) and last_module not in sys.modules:
        sys.meta_path.insert(0, _AfterModule(last_module, action))
    else:
        action()


def is_being_imported(name: str) -> bool:
    """Whether a module's body is still running."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


class _AfterModule(importlib.abc.MetaPathFinder):
    """Finds one module as usual, but runs an action when its body has been executed; then removes itself."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Delegate to the other finders and dress their loader."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, self._action)
        return spec


class _ActingLoader(importlib.abc.Loader):
    """A loader that runs an action after its module."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self._loader = loader
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the original loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module as the original loader does, then act."""
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._action()
