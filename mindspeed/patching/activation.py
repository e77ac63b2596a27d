"""The five steps from flags to a changed host: choose, normalise, check, plan, apply.

    active = settle(features, args)            choose what is on, write derived values to args
    with overridden(args, active): ...         the host validates
    active = check(features, args)             every problem at once
    activate(active, host, ledger)             subscribe, plan (nothing has changed so far), apply

Used alike for Megatron-LM, the built-in trainer and `mindspeed.enable`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspeed.errors import ConfigError, Problem, TargetError
from mindspeed.patching.feature import Change, Feature, MissingArgument, RunShape
from mindspeed.patching.flags import flag_specs, read_flags
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.parser import EngineFlags, add_flags, explain_unknown_flags, given_flags, unknown_flag
from mindspeed.patching.patch import Patch
from mindspeed.patching.plan import Plan
from mindspeed.patching.resolve import MISSING

if TYPE_CHECKING:
    from mindspeed.host.protocol import Host

__all__ = [
    "Active",
    "EngineFlags",
    "activate",
    "add_flags",
    "check",
    "choose",
    "explain_unknown_flags",
    "given_flags",
    "off",
    "overridden",
    "plan_for",
    "settle",
    "unknown_flag",
]
_log = logging.getLogger(__name__)
_MOST_ROUNDS = 8  # derived values may switch on features that derive values; real chains have two links


@dataclass(frozen=True)
class Active:
    """A feature that is on, with its flags and what switched it on."""

    feature: Feature
    flags: Any
    why: str

    @property
    def name(self) -> str:
        """The feature's name."""
        return self.feature.name


def choose(
    features: Iterable[Feature], args: argparse.Namespace, *, platform: str = "", given: Collection[str] = ()
) -> list[Active]:
    """Features that are on under `args`, by name.

    Raises:
        ConfigError: flags with unreadable or impossible values, or above `--optimization-level`.
    """
    active, problems = _survey(features, args, run_shape(args, platform, given))
    if problems:
        raise ConfigError(problems)
    return active


def run_shape(args: argparse.Namespace, platform: str = "", given: Collection[str] = ()) -> RunShape:
    """What features may look at: `args`, the platform's name and the destinations that the user set."""
    if not platform:
        from mindspeed.platform import current

        platform = current().name
    return RunShape(args, platform, frozenset(given) or frozenset(getattr(args, "given_flags", ()) or ()))


def _survey(features: Iterable[Feature], args: argparse.Namespace, run: RunShape) -> tuple[list[Active], list[Problem]]:
    active: list[Active] = []
    problems: list[Problem] = []
    level = _level(args, problems)
    for feature in sorted(features, key=lambda feature: feature.name):
        try:
            flags = read_flags(feature.flags, vars(args))
            why = _why(feature, flags, run)
        except ConfigError as error:
            problems += error.problems
            continue
        except MissingArgument as error:
            problems.append(_missing(feature.name, error))
            continue
        if why and feature.level <= level:
            active.append(Active(feature, flags, why))
        elif why and feature.level > level and _is_own_flag(feature, why):
            problems.append(
                Problem(why, None, f"needs --optimization-level {feature.level} (given {level})", f"give it or remove {why}")
            )
        elif why and feature.level == 2:
            _log.info("%s (%s) stays off: --optimization-level %d", feature.name, why, level)
    return active, list(dict.fromkeys(problems))


def _level(args: argparse.Namespace, problems: list[Problem]) -> int:
    try:
        return int(read_flags(EngineFlags, vars(args)).optimization_level)
    except ConfigError as error:
        problems += error.problems
        return 2


def _why(feature: Feature, flags: Any, run: RunShape) -> str:
    """What switches a feature on; those of level 0 and 1 are on by themselves unless they say otherwise."""
    why = feature.why(flags, run)
    if why or feature.level == 2 or type(feature).why is not Feature.why:
        return why
    return "always" if feature.level == 0 else "--optimization-level 1 or higher"


def _is_own_flag(feature: Feature, why: str) -> bool:
    return why.split(" ")[0] in {option for spec in feature.specs for option in (spec.option, *spec.aliases)}


def _missing(who: str, error: MissingArgument) -> Problem:
    rule = f"needs the run's {error.dest!r}, which is not known here"
    return Problem(who, None, rule, f"add {error.dest} to what you pass to mindspeed.enable")


def settle(
    features: Iterable[Feature], args: argparse.Namespace, *, platform: str = "", given: Collection[str] = ()
) -> list[Active]:
    """Write to `args` what the features that are on derive, and return those features.

    Afterwards `args.mindspeed` has `.requested` (all values before), `.derived` (one line per change) and
    `.original` (earlier values of what was changed); plain data, since hosts save arguments in checkpoints.
    Flags that cannot be read are left for `check` to report.

    Raises:
        ConfigError: two features derive different values for one argument.
    """
    features = tuple(features)
    run = run_shape(args, platform, given)
    before = {name: value for name, value in vars(args).items() if name != "mindspeed"}
    for spec in (spec for holder in (EngineFlags, *(f.flags for f in features)) for spec in flag_specs(holder)):
        vars(args).setdefault(spec.dest, spec.default)
    whole = dict(vars(args))
    written: dict[str, tuple[Active, Change]] = {}
    lines: list[str] = []
    for _ in range(_MOST_ROUNDS):
        active, _problems = _survey(features, args, run)
        changes = [(one, change) for one in active for change in _derived(one, run)]
        if not any([_write(args, one, change, written, lines) for one, change in changes]):
            break
    original = {dest: whole.get(dest) for dest in written if getattr(args, dest) is not whole.get(dest)}
    args.mindspeed = argparse.Namespace(requested=before, derived=lines, original=original)
    return active


def _derived(one: Active, run: RunShape) -> list[Change]:
    try:
        return list(one.feature.normalise(one.flags, run))
    except MissingArgument:
        return []  # check reports it


def _write(
    args: argparse.Namespace, one: Active, change: Change, written: dict[str, tuple[Active, Change]], lines: list[str]
) -> bool:
    old = getattr(args, change.dest, None)
    if type(old) is type(change.value) and old == change.value:
        written.setdefault(change.dest, (one, change))
        return False
    option = "--" + change.dest.replace("_", "-")
    if change.dest in written and written[change.dest][0].name != one.name:
        other, theirs = written[change.dest]
        rule = f"is set to {theirs.value!r} by {other.why} ({theirs.because}) and to {change.value!r} by {one.why} ({change.because})"
        raise ConfigError([Problem(option, None, rule, f"use one of {other.why} and {one.why}")])
    written[change.dest] = (one, change)
    setattr(args, change.dest, change.value)
    lines.append(f"{option}: {old!r} -> {change.value!r} because {change.because}")
    _log.info("%s", lines[-1])
    return True


@contextlib.contextmanager
def overridden(args: argparse.Namespace, active: Iterable[Active], *, platform: str = "") -> Iterator[None]:
    """Show neutral values to the host's validation inside a block, and restore the real ones whatever happens.

    Raises:
        ConfigError: two features want different neutral values for one argument.
    """
    run = run_shape(args, platform)
    neutral: dict[str, tuple[Active, Any]] = {}
    for one in active:
        for dest, value in one.feature.host_overrides(one.flags, run).items():
            other, theirs = neutral.setdefault(dest, (one, value))
            if theirs != value:
                rule = f"must be hidden from the host as {theirs!r} for {other.why} and as {value!r} for {one.why}"
                raise ConfigError([Problem("--" + dest.replace("_", "-"), None, rule, "use one of them")])
    real = {dest: getattr(args, dest, MISSING) for dest in neutral}
    try:
        for dest, (_, value) in neutral.items():
            setattr(args, dest, value)
        yield
    finally:
        for dest, value in real.items():
            if value is not MISSING:
                setattr(args, dest, value)
            elif hasattr(args, dest):
                delattr(args, dest)


def check(
    features: Iterable[Feature],
    args: argparse.Namespace,
    *,
    platform: str = "",
    given: Collection[str] = (),
    more: Iterable[Problem] = (),
) -> list[Active]:
    """Apply every rule of the features that are on; return these features.

    Args:
        more: problems found elsewhere, to be reported together.

    Raises:
        ConfigError: with all problems.
    """
    run = run_shape(args, platform, given)
    features = tuple(features)
    active, problems = _survey(features, args, run)
    problems = [*more, *problems]
    sound = []
    for one in active:
        known = len(problems)
        try:
            problems += one.feature.check(one.flags, run)
        except MissingArgument as error:
            problems.append(_missing(one.why if one.why.startswith("--") else one.name, error))
        sound += [one] if len(problems) == known else []
    for feature, flags in off(features, active, args):
        problems += feature.check_off(flags, run)
    problems += _unmet(sound, active, features)
    problems += _combined(active)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return active


def off(features: Iterable[Feature], active: Iterable[Active], args: argparse.Namespace) -> Iterator[tuple[Feature, Any]]:
    """Features that are off, with the flags that are given for them all the same; unreadable ones are left out."""
    on = {one.name for one in active}
    for feature in sorted(features, key=lambda feature: feature.name):
        if feature.name not in on:
            with contextlib.suppress(ConfigError):  # reported by the survey
                yield feature, read_flags(feature.flags, vars(args))


def _unmet(asked: Iterable[Active], active: Iterable[Active], features: Iterable[Feature]) -> Iterator[Problem]:
    """Needs of the features in `asked` that are off; a feature that was refused has said why already."""
    on = {one.name for one in active}
    by_name = {feature.name: feature for feature in features}
    for one in asked:
        for need in one.feature.needs:
            if need not in on:
                options = [spec.option for spec in by_name[need].specs] if need in by_name else []
                switch = by_name[need].switch if need in by_name else ""
                fix = f"give {switch}" if switch else f"add {options[0]}" if options else f"switch on {need}"
                yield Problem(one.why, None, f"needs the feature {need}, which is off", fix)


def _combined(active: Iterable[Active]) -> Iterator[Problem]:
    """Pairs that cannot be on together; it is enough that one of them says so."""
    ordered = sorted(active, key=lambda one: one.name)
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            reason = first.feature.conflicts.get(second.name) or second.feature.conflicts.get(first.name)
            if reason:
                rule = f"cannot be combined with {second.why}: {reason}"
                yield Problem(first.why, None, rule, f"remove {first.why} or {second.why}")


def plan_for(active: Iterable[Active], host: Host, ledger: Ledger | None = None, extra: Iterable[Patch] = ()) -> Plan:
    """Resolve and order the patches of features that are on, and `extra` ones; nothing is changed.

    Raises:
        TargetError, ConflictError: see `Plan.of`.
    """
    patches = list(extra)
    for one in active:
        for patch in one.feature.patches(one.flags, host):
            owned = dataclasses.replace(patch, owner=patch.owner or one.name, flag=patch.flag or one.why)
            real = _on_this_host(owned, host)
            if real is not None:
                patches.append(real)
    return Plan.of(patches, ledger=ledger)


def _on_this_host(patch: Patch, host: Host) -> Patch | None:
    """The patch with a logical target translated; None for an optional one that this host lacks."""
    if not patch.target.startswith("training:"):
        return patch
    try:
        return dataclasses.replace(patch, target=host.target(patch.target))
    except TargetError as error:
        if patch.optional:
            _log.info("%s goes without its patch of %s: %s", patch.owner, patch.target, error)
            return None
        name = patch.target.partition(":")[2]
        raise TargetError(
            f"feature {patch.owner!r} ({patch.flag}) needs the training loop's function {name}, which a program with its "
            f"own loop does not have; remove {patch.flag}, or train with `mindspeed pretrain` or Megatron-LM"
        ) from error


def activate(active: Iterable[Active], host: Host, ledger: Ledger, extra: Iterable[Patch] = ()) -> Plan:
    """Subscribe the features that are on, plan and apply; on an exception nothing of it has happened.

    A host that patches only what somebody waits for offers `event_patches()`, asked after subscription.
    """
    active = list(active)
    before = host.events.subscriptions()
    try:
        for one in active:
            one.feature.subscribe(one.flags, host)
        event_patches: Callable[[], Iterable[Patch]] = getattr(host, "event_patches", tuple)
        plan = plan_for(active, host, ledger, [*extra, *event_patches()])
        plan.apply(ledger)
    except BaseException:
        host.events.restore(before)
        raise
    return plan
