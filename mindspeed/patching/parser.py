"""One parser for a host's flags and those of all features."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed.errors import ConfigError, Problem
from mindspeed.patching.feature import Feature
from mindspeed.patching.flags import FlagSpec, flag, flag_specs
from mindspeed.patching.withdrawn import withdrawn, without_effect

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Flags that steer all features."""

    optimization_level: int = flag(
        2,
        "0: what the device needs; 1: and fused kernels that need no flag; 2: and features chosen by flags.",
        choices=(0, 1, 2),
    )
    log_patches: bool = flag(False, "Print every change made to Megatron and torch, with owner and reason, at start.")


def all_specs(features: Iterable[Feature]) -> dict[str, FlagSpec]:
    """Flags of the engine and of all features by destination, each once.

    Raises:
        TypeError: two features declare one flag differently.
    """
    specs: dict[str, FlagSpec] = {spec.dest: spec for spec in flag_specs(EngineFlags)}
    for feature in features:
        for spec in feature.specs:
            known = specs.setdefault(spec.dest, spec)
            if (known.option, known.kind, known.default, known.is_many) != (spec.option, spec.kind, spec.default, spec.is_many):
                raise TypeError(f"feature {feature.name!r} declares {spec.option} unlike another feature: {spec} and {known}")
    return specs


def add_flags(parser: argparse.ArgumentParser, features: Iterable[Feature]) -> argparse.ArgumentParser:
    """Add all features' flags to a parser that has the host's (and the user's) flags already.

    A flag that is there with the same type is shared; further choices of ours join it.

    Raises:
        ConfigError: flags that are there with another type, all of them.
    """
    features = tuple(features)
    specs = all_specs(features)
    problems: list[Problem] = []
    engine = [specs[spec.dest] for spec in flag_specs(EngineFlags)]
    _add_group(parser, "mindspeed", "Acceleration features.", engine, problems)
    for feature in features:
        _add_group(parser, f"mindspeed: {feature.name}", feature.summary, feature.specs, problems)
        feature.register_args(parser)
    if problems:
        raise ConfigError(problems)
    known = parser._option_string_actions
    for option, values in without_effect().items():
        if option not in known:
            parser.add_argument(option, action=_Ignored, nargs=0 if values is None else None, help=argparse.SUPPRESS)
    return parser


def _add_group(
    parser: argparse.ArgumentParser, title: str, summary: str, specs: Sequence[FlagSpec], problems: list[Problem]
) -> None:
    new = []
    for spec in specs:
        there = parser._option_string_actions.get(spec.option) or _with_dest(parser, spec.dest)
        if there is None:
            new.append(spec)
        elif reason := _differs(there, spec):
            problems.append(
                Problem(
                    spec.option, None, f"is defined by the program with {reason}", "rename or remove the program's own flag"
                )
            )
        elif there.choices is not None and spec.choices is not None:
            there.choices = [*there.choices, *(choice for choice in spec.choices if choice not in there.choices)]
    if new:
        group = parser.add_argument_group(title, summary)  # not %-formatted, unlike help
        for spec in new:
            # A second spelling that the program uses for something else stays the program's.
            free = tuple(alias for alias in spec.aliases if alias not in parser._option_string_actions)
            dataclasses.replace(spec, help=spec.help.replace("%", "%%"), aliases=free).add_to(group)


def _with_dest(parser: argparse.ArgumentParser, dest: str) -> argparse.Action | None:
    return next((action for action in parser._actions if action.dest == dest), None)


def _differs(action: argparse.Action, spec: FlagSpec) -> str:
    """How an existing flag differs from ours in kind, or an empty text."""
    is_switch = action.nargs == 0
    if is_switch != spec.is_switch:
        return f"{'no' if is_switch else 'a'} value, where mindspeed expects {'none' if spec.is_switch else 'one'}"
    if is_switch:
        return ""
    if (action.nargs in ("+", "*") or isinstance(action.nargs, int)) != spec.is_many:
        return "one value" if spec.is_many else "several values"
    there: Any = action.type or str
    if there is not spec.kind and isinstance(there, type) and isinstance(spec.kind, type):
        return f"type {there.__name__}, where mindspeed expects {spec.kind.__name__}"
    return ""


class _Ignored(argparse.Action):
    """Accepts an option of older scripts and says that it does nothing."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        allowed = without_effect().get(option or "")
        if allowed is not None and values not in allowed:
            parser.error(f"{option} {values}: only {' or '.join(allowed)} is supported; leave the flag out")
        _log.warning("%s has no effect any more and can be left out", option)


def unknown_flag(option: str, known: Iterable[str]) -> Problem:
    """What to say about an option that no parser has: what became of it, or the three nearest names."""
    option = option.partition("=")[0]
    gone = withdrawn(option)
    if gone is not None:
        return Problem(option, None, f"was withdrawn ({gone.why})", gone.instead)
    near = difflib.get_close_matches(option, sorted(set(known)), n=3, cutoff=0.5)
    return Problem(option, None, "is not a flag", f"did you mean {' or '.join(near)}" if near else "see --help for all flags")


def explain_unknown_flags(parser: argparse.ArgumentParser) -> None:
    """Make a parser's complaint about unknown flags say what became of them or what is spelled alike."""
    original: Callable[..., Any] = parser.error
    head = "unrecognized arguments: "

    def error(message: str) -> Any:
        if message.startswith(head):
            words = [word for word in message.removeprefix(head).split(" ") if word.startswith("--")]
            told = [str(unknown_flag(word, parser._option_string_actions)) for word in words]
            message = "\n".join([message, *(f"  {text}" for text in told)])
        return original(message)

    parser.error = error  # type: ignore[method-assign]


def given_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> frozenset[str]:
    """Destinations that a command line names, whatever their values; a flag named twice is logged (the last wins)."""
    given: dict[str, str] = {}
    for word in words:
        option = word.partition("=")[0]
        action = parser._option_string_actions.get(option) if word.startswith("-") else None
        if action is not None:
            if action.dest in given:
                _log.warning("%s is given more than once; the last value counts", option)
            given[action.dest] = option
    return frozenset(given)
