"""A feature: flags, rules and patches of one capability, declared below its method in one module of `core/`.

class NoopLayers(Feature):
    '''Leave chosen layer slots empty so that pipeline stages carry equal work.'''
    flags = NoopFlags

    def check(self, flags, run):
        ...yield Problem(...)

    def patches(self, flags, host):
        yield wrap("megatron.core...:TransformerBlock._build_layers", skip(flags.noop_layers))
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mindspeed.errors import Problem
from mindspeed.patching.flags import FlagSpec, NoFlags, flag_specs
from mindspeed.patching.patch import Patch

if TYPE_CHECKING:
    from mindspeed.host.protocol import Host


@dataclass(frozen=True)
class Change:
    """A derived value that a feature asks to be written to the run's arguments before validation ends."""

    dest: str
    value: Any
    because: str


class MissingArgument(AttributeError):
    """A feature asked for an argument that the run does not have."""

    def __init__(self, dest: str) -> None:
        super().__init__(f"this host has no argument {dest!r}")
        self.dest = dest


class RunShape:
    """Read-only view of the host's parsed arguments: `run.seq_length`, `run.get("moe_layer_freq", 1)`.

    Attributes are the host's destination names. A name that this host does not have raises
    MissingArgument naming it (a problem, where checks run); use `get` for names that only some hosts have.
    """

    def __init__(self, args: argparse.Namespace, platform: str, given: frozenset[str] = frozenset()) -> None:
        self._args = args
        self.platform = platform
        self.given = given  # destinations that the user set explicitly, whatever the value

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.__dict__["_args"], name)
        except AttributeError:
            raise MissingArgument(name) from None

    def get(self, name: str, default: Any = None) -> Any:
        """Value of an argument that some hosts lack."""
        return getattr(self._args, name, default)

    @property
    def namespace(self) -> argparse.Namespace:
        """The arguments themselves, for code that takes a namespace; nobody changes them."""
        return self._args

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return int(self.get("world_size") or 1)


class Feature:
    """Base of all features; subclasses are found by walking `mindspeed.core` and need no registration.

    Class attributes:
        name: dashed name shown to users; derived from the class name by default.
        level: 0 always, 1 no flag needed, 2 chosen by flags (compare `--optimization-level`).
        flags: dataclass of this feature's own flags.
        conflicts: names of features that cannot be on together with this one, with the reason.
        needs: names of features that must be on as well.
        switch: what turns it on, where its own flags do not: told to users who gave such a flag while it is off.
        page: docs page below docs/features/, derived from the name by default.
    """

    name: ClassVar[str] = ""
    level: ClassVar[int] = 2
    flags: ClassVar[type] = NoFlags
    conflicts: ClassVar[dict[str, str]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    switch: ClassVar[str] = ""
    page: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not (cls.__doc__ or "").strip():
            raise TypeError(f"feature {cls.__name__} needs a docstring that says what it does")
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
        if "page" not in cls.__dict__:
            cls.page = cls.name

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.__doc__ or "").strip().splitlines()[0]

    @property
    def specs(self) -> tuple[FlagSpec, ...]:
        """This feature's own flags."""
        return flag_specs(self.flags)

    def register_args(self, parser: argparse.ArgumentParser) -> None:
        """Hook for features that cannot declare their flags as a dataclass (those of the older form)."""

    def why(self, flags: Any, run: RunShape) -> str:
        """The flag (with value) that turns this feature on, or an empty string when it is off.

        By default: the first own flag whose value differs from its default. Override for features that
        host flags switch on; `run` may belong to a host that is not validated yet.
        """
        for spec in self.specs:
            value = getattr(flags, spec.dest)
            if value != spec.default:
                return spec.option if spec.is_switch else f"{spec.option} {value}"
        return ""

    def normalise(self, flags: Any, run: RunShape) -> Iterator[Change]:
        """Derived values to be written to the arguments; each is logged with its reason."""
        return iter(())

    def host_overrides(self, flags: Any, run: RunShape) -> dict[str, Any]:
        """Neutral values that the host's own validation must see; the real ones are restored after it."""
        return {}

    def check(self, flags: Any, run: RunShape) -> Iterator[Problem]:
        """Every violated rule of this feature; called only when it is on."""
        return iter(())

    def check_off(self, flags: Any, run: RunShape) -> Iterator[Problem]:
        """Rules that hold while this feature is off: its flags that must not be dropped, host flags it alone can honour.

        Own flags without a rule here are told to the user as having no effect (`mindspeed.patching.idle`).
        """
        return iter(())

    def patches(self, flags: Any, host: Host) -> Iterator[Patch]:
        """The changes this feature makes to the host."""
        return iter(())

    def subscribe(self, flags: Any, host: Host) -> None:
        """Register for host events: `host.events.on("model_built", self.handler)`."""

    def subscribe_off(self, flags: Any, host: Host) -> None:
        """Told that a run starts without this feature, so that calls of users which need it can say so."""
