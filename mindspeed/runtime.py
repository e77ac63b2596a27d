"""What is on in this process: `mindspeed.enable(...)`, `mindspeed.revert()`, and the `Runtime` behind them.

handle = mindspeed.enable({"noop-layers": "0,7", "num-layers": 8})
...
handle.revert()                       # or use it as a context manager

with mindspeed.enabled(noop_layers="0,7", num_layers=8) as handle:
    ...
    assert handle.ledger.calls("megatron.core.transformer.transformer_block:TransformerBlock._build_layers")
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mindspeed.errors import MindspeedError

if TYPE_CHECKING:
    from mindspeed.host.protocol import Host
    from mindspeed.patching.activation import Active
    from mindspeed.patching.feature import Feature
    from mindspeed.patching.ledger import Ledger, Row
    from mindspeed.patching.settings import Settings
    from mindspeed.platform import Platform

_log = logging.getLogger(__name__)


class Runtime:
    """Platform, host, features and ledger of one process.

    Attributes:
        host: the program that trains.
        active: those that are, with their flags and reasons.
        settings: what configs carry as `config.mindspeed`; None when no feature is on.
        ledger: every change in force.
    """

    def __init__(self, host: Host, features: Iterable[Feature] | None = None) -> None:
        from mindspeed.patching.discovery import all_features
        from mindspeed.patching.ledger import Ledger

        self.host = host
        self._features = tuple(all_features() if features is None else features)
        self.active: tuple[Active, ...] = ()
        self.settings: Settings | None = None
        self.ledger: Ledger = Ledger()
        self._older: list[tuple[Any, Feature]] = []
        self._rows: tuple[Row, ...] = ()  # made by the present activation; the others are the ground

    @property
    def features(self) -> tuple[Feature, ...]:
        """All features that could be on, those of the older form included that other projects listed."""
        manager = sys.modules.get("mindspeed.features_manager.features_manager")
        older = manager.MindSpeedFeaturesManager.FEATURES_LIST if manager is not None else []
        if [one for one, _ in self._older] != older:
            from mindspeed.features_manager.adapter import adapted

            self._older = list(zip(older, adapted(older), strict=True))
        return (*self._features, *(feature for _, feature in self._older))

    @property
    def platform(self) -> Platform:
        """The device of this process."""
        from mindspeed.platform import current

        return current()

    def prepare(self) -> None:
        """Lay the ground: retarget torch to the platform and repair megatron-core, whatever flags are given."""
        from mindspeed.host import level0

        level0.activate(self.ledger)

    def settle(self, args: argparse.Namespace, given: Collection[str] = ()) -> list[Active]:
        """Write derived values to `args` before the host validates; see `activation.settle`."""
        from mindspeed.patching import activation

        return activation.settle(self.features, args, platform=self.platform.name, given=given)

    def check(self, args: argparse.Namespace, given: Collection[str] = ()) -> list[Active]:
        """Apply all rules; see `activation.check`."""
        from mindspeed.patching import activation

        return activation.check(self.features, args, platform=self.platform.name, given=given)

    def activate(self, active: Iterable[Active] | None = None, *, announce: bool = True) -> None:
        """Check, plan and apply the features that `host.args` switch on; all or nothing.

        Args:
            active: result of `check`, to spare a second one.
            announce: print the table of features on the first rank.

        Raises:
            ConfigError, TargetError, ConflictError: nothing has changed then.
        """
        from mindspeed.patching import activation, idle, overview
        from mindspeed.patching.settings import config_patches

        if self.active:
            raise MindspeedError(f"features are on already ({', '.join(one.name for one in self.active)}); use repatch")
        chosen = tuple(self.check(self.host.args) if active is None else active)
        settings = self._settings_of(chosen)
        count = len(self.ledger)
        extra = [] if settings is None else config_patches(settings)
        activation.activate(chosen, self.host, self.ledger, extra)
        for feature, flags in activation.off(self.features, chosen, self.host.args):
            feature.subscribe_off(flags, self.host)
        self._rows = self.ledger.rows[count:]
        self.active, self.settings = chosen, settings
        for flag in idle.idle_flags(self.features, chosen, self.host.args) if overview.is_first_rank() else ():
            _log.warning("%s", flag)
        if announce:
            overview.show(self.active, self.ledger, self.host.args)

    def _settings_of(self, active: tuple[Active, ...]) -> Settings | None:
        from mindspeed.patching.parser import all_specs
        from mindspeed.patching.settings import Settings

        if not active:
            return None
        values = {dest: getattr(self.host.args, dest, spec.default) for dest, spec in all_specs(self.features).items()}
        for one in active:  # converted to the flags' types
            values.update({spec.dest: getattr(one.flags, spec.dest) for spec in one.feature.specs})
        return Settings((one.name for one in active), values)

    def adopt(self, rows: Iterable[Row]) -> None:
        """Let further rows of the ledger go together with the features."""
        self._rows = (*self._rows, *rows)

    def deactivate(self, force: bool = False) -> None:
        """Undo what the features changed; platform and repairs stay.

        Raises:
            LedgerError: see `Ledger.revert`.
        """
        self.ledger.revert_rows(self._rows, force=force)
        self.host.events.clear()
        self.active, self.settings, self._rows = (), None, ()

    def repatch(self, changes: Mapping[str, Any]) -> None:
        """Change arguments and apply the features anew; on an exception everything is as before.

        Args:
            changes: new values by flag name (dashes or underscores).
        """
        args = self.host.args
        before, was_active = dict(vars(args)), self.active
        record = getattr(args, "mindspeed", None)
        for dest, value in getattr(record, "original", {}).items():
            setattr(args, dest, value)  # derived values are derived anew
        try:
            for name, value in changes.items():
                setattr(args, name.lstrip("-").replace("-", "_"), value)
            self.settle(args)
            active = self.check(args)
            self.deactivate()
            self.activate(active)
        except BaseException:
            vars(args).clear()
            vars(args).update(before)
            if was_active and not self.active:
                self.activate(was_active, announce=False)
            raise

    def revert(self, force: bool = False) -> None:
        """Undo everything, the ground included; see `Ledger.revert`."""
        self.ledger.revert(force=force)
        self.host.events.fire("reverted")
        self.host.events.clear()
        self.active, self.settings, self._rows = (), None, ()


class _Process:
    """Holds the one runtime of this process."""

    runtime: Runtime | None = None


_process = _Process()


class Handle:
    """What `enable` returns: the ledger, the way back, and the arguments after all derived values."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @property
    def ledger(self) -> Ledger:
        """Every change in force."""
        return self._runtime.ledger

    @property
    def args(self) -> argparse.Namespace:
        """The run's arguments."""
        return self._runtime.host.args

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that are on."""
        return tuple(one.name for one in self._runtime.active)

    @property
    def settings(self) -> Settings | None:
        """What configs made from now on carry as `config.mindspeed`."""
        return self._runtime.settings

    def fire(self, event: str, **details: Any) -> None:
        """Tell features of a moment that only the program's loop knows, e.g. `fire("log_line", metrics=...)`."""
        self._runtime.host.events.fire(event, **details)

    def revert(self, force: bool = False) -> None:
        """Undo everything that `enable` did; a second call does nothing."""
        if _process.runtime is self._runtime:
            revert(force=force)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.revert()


def enable(config: Any = None, /, **flags: Any) -> Handle:
    """Switch features on in a program that parses no command line for Megatron.

    Args:
        config: an argparse.Namespace, a dict of flags (`{"noop-layers": "0,7"}`), a TransformerConfig or an
            instance of a subclass, or nothing. Values that features derive are written to a namespace or
            config; nothing is read from sys.argv.
        flags: further values by name; these win.

    Raises:
        ConfigError: something that was asked for cannot be honoured; every reason is listed, nothing has changed.
        TargetError, ConflictError: a feature does not fit the installed megatron-core or another feature.
        MindspeedError: mindspeed is active in this process already.
    """
    return _enable(config, flags, announce=True)


def _enable(config: Any, flags: Mapping[str, Any], *, announce: bool) -> Handle:
    from mindspeed.host.program import ProgramHost, run_args
    from mindspeed.patching.discovery import all_features
    from mindspeed.patching.parser import all_specs

    if _process.runtime is not None:
        kind = _process.runtime.host.kind
        raise MindspeedError(f"mindspeed is active already (host: {kind}); revert() first, or change flags with repatch()")
    args = run_args(config, flags, all_specs(all_features()))
    new = Runtime(ProgramHost(args))
    new.settle(args)
    active = new.check(args)
    try:
        new.prepare()
        new.activate(active, announce=announce)
        new.adopt(_write_back(config, new))
    except BaseException:
        new.revert(force=True)
        raise
    _process.runtime = new
    return Handle(new)


def _write_back(config: Any, active: Runtime) -> list[Row]:
    """Show a namespace or config that exists already what new ones would have; undone by `revert`."""
    from mindspeed.patching.aliases import InstancePlace

    if config is None or isinstance(config, Mapping):
        return []
    record = active.host.args.mindspeed
    values: dict[str, Any] = {dest: getattr(active.host.args, dest) for dest in record.original}
    if isinstance(config, argparse.Namespace):
        values["mindspeed"] = record
    else:
        values = {dest: value for dest, value in values.items() if hasattr(config, dest)}
        values["mindspeed"] = active.settings
    reason = "derived values are written to what was passed to mindspeed.enable"
    return [
        active.ledger.record_set(
            InstancePlace(config, dest, f"{type(config).__name__}.{dest}"), value, owner="host.config", reason=reason
        )
        for dest, value in values.items()
    ]


@contextlib.contextmanager
def enabled(config: Any = None, /, **flags: Any) -> Iterator[Handle]:
    """`enable` for the time of a block, without printing; for tests and notebooks."""
    handle = _enable(config, flags, announce=False)
    try:
        yield handle
    finally:
        handle.revert()


def start(host: Host, features: Iterable[Feature] | None = None) -> Runtime:
    """Make the runtime of this process for a host that drives the steps itself, and lay the ground.

    Raises:
        MindspeedError: there is one already, for another host.
    """
    if _process.runtime is not None:
        raise MindspeedError(f"mindspeed is active already (host: {_process.runtime.host.kind}); call mindspeed.revert() first")
    new = Runtime(host, features)
    try:
        new.prepare()
    except BaseException:
        new.revert(force=True)
        raise
    _process.runtime = new
    return new


def runtime() -> Runtime:
    """The runtime of this process.

    Raises:
        MindspeedError: mindspeed is not active.
    """
    if _process.runtime is None:
        raise MindspeedError("mindspeed is not active: import mindspeed.megatron_adaptor, or call mindspeed.enable")
    return _process.runtime


def revert(force: bool = False) -> None:
    """Undo every change of this process; nothing happens when there is none.

    Raises:
        LedgerError: somebody changed a target after us; nothing is undone then, unless `force`.
    """
    if _process.runtime is not None:
        _process.runtime.revert(force=force)
        _process.runtime = None


def patches() -> tuple[Row, ...]:
    """Every change in force in this process, in the order they were made."""
    return () if _process.runtime is None else _process.runtime.ledger.rows


def repatch(changes: Mapping[str, Any]) -> None:
    """Change flags after activation: features are undone, checked and applied anew; the ground stays.

    Raises:
        MindspeedError: mindspeed is not active.
        ConfigError, TargetError, ConflictError: everything is as before then.
    """
    runtime().repatch(changes)
