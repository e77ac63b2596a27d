"""Names that other projects import to register patches by text; everything goes through the ledger.

    MindSpeedPatchesManager.register_patch("megatron.core.utils.divide", my_divide)          # replaces
    MindSpeedPatchesManager.register_patch("megatron.core.utils.divide", checking_wrapper)   # wraps: the name says so
    MindSpeedPatchesManager.apply_patches()

New code declares a `mindspeed.patching.Feature` instead.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from mindspeed.errors import ConflictError, TargetError
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.patch import Operation
from mindspeed.patching.patch import Patch as EnginePatch
from mindspeed.patching.plan import Plan
from mindspeed.patching.resolve import resolve

_log = logging.getLogger(__name__)
_WRAPPING = ("wrapper", "decorator")
ABSENT = "mindspeed.absent"


class Patch:
    """What was registered for one target: at most one replacement, and wrappers from the inside out."""

    def __init__(self, orig_func_name: str, new_func: Any = None, create_dummy: bool = False, owner: str = "") -> None:
        self.orig_func_name = orig_func_name
        self.create_dummy = create_dummy
        self.owner = owner or "patch_utils"
        self.patch_func: Any = None
        self.wrappers: list[Callable[..., Any]] = []
        if new_func is not None:
            self.set_patch_func(new_func)

    def set_patch_func(self, new_func: Any, force_patch: bool = False) -> None:
        """Add a wrapper (by its name's ending) or set the replacement.

        Raises:
            ConflictError: there is a replacement already, unless `force_patch`.
        """
        if getattr(new_func, "__name__", "").endswith(_WRAPPING):
            if new_func not in self.wrappers:
                self.wrappers.append(new_func)
            return
        if self.patch_func not in (None, new_func) and not force_patch:
            raise ConflictError(
                f"{self.orig_func_name} is to be replaced by {_name(self.patch_func)} and by {_name(new_func)}; "
                "use one of them, or force_patch=True for the second"
            )
        self.patch_func = new_func

    def remove_wrappers(self, wrapper_names: str | list[str] | None = None) -> None:
        """Forget wrappers of these names, or all."""
        names = [wrapper_names] if isinstance(wrapper_names, str) else wrapper_names
        self.wrappers = [] if names is None else [one for one in self.wrappers if one.__name__ not in names]

    def engine_patches(self) -> Iterator[EnginePatch]:
        """The same as data for a plan; nothing for an absent target that may be absent."""
        if self.create_dummy and _is_absent(self.orig_func_name):
            _stand_in(self.orig_func_name, self.patch_func)
            return
        reason = "registered by register_patch"
        if self.patch_func is not None:
            yield EnginePatch(Operation.REPLACE, self.orig_func_name, self.patch_func, reason, unrelated=True, owner=self.owner)
        for wrapper in self.wrappers:
            # The order of registration is what these callers rely on.
            yield EnginePatch(Operation.WRAP, self.orig_func_name, _advice(wrapper), reason, after=("*",), owner=self.owner)


class MindSpeedPatchesManager:
    """All registrations of this process that were not applied yet, and where applied ones are recorded."""

    patches_info: ClassVar[dict[str, Patch]] = {}
    ledger: ClassVar[Ledger] = Ledger()
    _owner: ClassVar[list[str]] = ["patch_utils"]

    @classmethod
    def register_patch(
        cls, orig_func_name: str, new_func: Any = None, force_patch: bool = False, create_dummy: bool = False
    ) -> None:
        """Plan to wrap or replace a target, given in dotted form.

        Args:
            new_func: wraps if its name ends in `wrapper` or `decorator` (it is called with the original and
                returns the new function), replaces otherwise.
            force_patch: replace an earlier replacement.
            create_dummy: an absent target is no error; a stand-in is made below `mindspeed.absent`, not in the host.
        """
        if orig_func_name not in cls.patches_info:
            cls.patches_info[orig_func_name] = Patch(orig_func_name, new_func, create_dummy, cls._owner[-1])
        elif new_func is not None:
            cls.patches_info[orig_func_name].set_patch_func(new_func, force_patch)

    @classmethod
    def remove_wrappers(cls, orig_func_name: str, wrappers_name: str | list[str] | None = None) -> None:
        """Forget registered wrappers of a target."""
        if orig_func_name in cls.patches_info:
            cls.patches_info[orig_func_name].remove_wrappers(wrappers_name)

    @classmethod
    def apply_patches(cls) -> None:
        """Apply what is registered, all or nothing; recorded in the runtime's ledger where there is one."""
        Plan.of(cls.take(), ledger=cls._ledger()).apply(cls._ledger())

    @classmethod
    def take(cls) -> list[EnginePatch]:
        """Hand over what is registered, as patches for a plan."""
        patches = [one for patch in cls.patches_info.values() for one in patch.engine_patches()]
        cls.patches_info.clear()
        return patches

    @classmethod
    def _ledger(cls) -> Ledger:
        process = sys.modules["mindspeed.runtime"]._process
        return cls.ledger if process.runtime is None else process.runtime.ledger

    @classmethod
    @contextlib.contextmanager
    def registering_for(cls, owner: str) -> Iterator[None]:
        """Rows of what is registered inside the block name this owner."""
        cls._owner.append(owner)
        try:
            yield
        finally:
            cls._owner.pop()


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


def _advice(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as around advice; the decorated function is made once for each original."""
    made: dict[Any, Callable[..., Any]] = {}

    def advice(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if original not in made:
            made[original] = wrapper(original)
        return made[original](*args, **kwargs)

    return advice


def _is_absent(target: str) -> bool:
    try:
        resolve(target)
    except TargetError:
        return True
    return False


def _stand_in(target: str, value: Any) -> None:
    """Make `mindspeed.absent.<module>` with the attribute; the host and other libraries see nothing of it."""
    module_name, _, attribute = f"{ABSENT}.{target}".rpartition(".")
    module = sys.modules.setdefault(module_name, types.ModuleType(module_name))
    setattr(module, attribute, value)
    _log.warning("%s does not exist; a stand-in was made as %s.%s", target, module_name, attribute)
