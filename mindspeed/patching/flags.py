"""Flags are dataclass fields: declared once beside their feature, read by parsers, docs and checks.

    @dataclass(frozen=True, kw_only=True)
    class RingFlags:
        cp_window_size: int = flag(1, "Ranks in the inner ring; 1 is the plain ring.", at_least=1)
        use_cp_send_recv_overlap: bool = flag(False, "Send the next block while computing this one.")

A bool field becomes a switch, `int | None` an optional int, `tuple[int, ...]` takes several values.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed.errors import ConfigError, Problem

_METADATA_KEY = "mindspeed.flag"


@dataclass(frozen=True, kw_only=True)
class NoFlags:
    """For features that are steered by the host's own flags alone."""


@dataclass(frozen=True, kw_only=True)
class FlagSpec:
    """Everything about one flag that a parser, a page or a check needs."""

    dest: str
    option: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    at_least: float | None = None
    at_most: float | None = None
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    is_switch: bool = False
    is_many: bool = False
    of_host: bool = False

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add this flag to an argparse parser or group (help shows the default)."""
        names = (self.option, *self.aliases)
        if self.is_switch:
            action = "store_false" if self.default is True else "store_true"
            parser.add_argument(*names, action=action, dest=self.dest, default=self.default, help=self.help)
            return
        options: dict[str, Any] = {"metavar": self.metavar} if self.metavar else {}
        if self.is_many:
            options["nargs"] = "+"
        parser.add_argument(
            *names, dest=self.dest, type=self.kind, default=self.default, choices=self.choices, help=self.help, **options
        )

    def problems(self, value: Any) -> Iterator[Problem]:
        """Yield what is wrong with `value` taken by itself."""
        if value is None or value == self.default:
            return
        if self.choices is not None:
            for item in value if self.is_many else (value,):
                if item not in self.choices:
                    yield Problem(self.option, item, f"must be one of {', '.join(map(str, self.choices))}", "pick one of them")
        if self.at_least is not None and value < self.at_least:
            yield Problem(self.option, value, f"must be at least {self.at_least}", f"use {self.at_least} or more")
        if self.at_most is not None and value > self.at_most:
            yield Problem(self.option, value, f"must be at most {self.at_most}", f"use {self.at_most} or less")


def flag(
    default: Any,
    help: str,
    *,
    option: str | None = None,
    choices: Sequence[Any] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    of_host: bool = False,
) -> Any:
    """Declare a flag as a dataclass field; the option name is the field name with dashes unless given.

    Args:
        default: value when the flag is absent; a switch whose default is True is given to turn it off.
        help: one sentence for a stranger.
        choices, at_least, at_most: checked for the command line, YAML and Python callers alike.
        aliases: further option strings with the same meaning.
        parse: converts the text of a value; by default the field's type.
        of_host: the host has this flag too and acts on it, whether the feature is on or off.
    """
    if not help.strip():
        raise TypeError("flag() needs a sentence that explains it")
    metadata = {
        "help": help,
        "option": option,
        "choices": None if choices is None else tuple(choices),
        "at_least": at_least,
        "at_most": at_most,
        "aliases": tuple(aliases),
        "metavar": metavar,
        "parse": parse,
        "of_host": of_host,
    }
    return dataclasses.field(default=default, metadata={_METADATA_KEY: metadata})


def flag_specs(flags_class: type) -> tuple[FlagSpec, ...]:
    """The flags declared by a flags dataclass, in order."""
    hints = typing.get_type_hints(flags_class)
    return tuple(
        _spec_of(field, hints[field.name]) for field in dataclasses.fields(flags_class) if _METADATA_KEY in field.metadata
    )


def _spec_of(field: dataclasses.Field[Any], hint: Any) -> FlagSpec:
    declared = dict(field.metadata[_METADATA_KEY])
    parse = declared.pop("parse")
    kind, is_many = _kind_of(hint)
    option = declared.pop("option") or "--" + field.name.replace("_", "-")
    return FlagSpec(
        dest=field.name,
        option=option,
        kind=parse or kind,
        default=field.default,
        is_switch=kind is bool and parse is None,
        is_many=is_many,
        **declared,
    )


def _kind_of(hint: Any) -> tuple[Callable[[str], Any], bool]:
    """Scalar type of an annotation, and whether the flag takes several values."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        return _kind_of(inner)
    if origin in (tuple, list):
        return _kind_of(typing.get_args(hint)[0])[0], True
    return hint, False


def read_flags(flags_class: type, values: Mapping[str, Any]) -> Any:
    """Build a flags instance from a namespace's dict; absent keys take their defaults.

    Raises:
        ConfigError: a value has the wrong type or range (programs without a parser reach this).
    """
    given: dict[str, Any] = {}
    problems: list[Problem] = []
    for spec in flag_specs(flags_class):
        value = _convert(spec, values.get(spec.dest, spec.default), problems)
        problems.extend(spec.problems(value))
        given[spec.dest] = value
    if problems:
        raise ConfigError(problems)
    return flags_class(**given)


def _convert(spec: FlagSpec, value: Any, problems: list[Problem]) -> Any:
    """Bring a value that did not pass through argparse to the flag's type."""
    if value is None or value == spec.default:
        return spec.default if value is None else value
    try:
        if spec.is_switch:
            if isinstance(value, bool):
                return value
            raise ValueError("expected true or false")
        if spec.is_many:
            return tuple(spec.kind(item) if isinstance(item, str) else item for item in value)
        if isinstance(value, str) and spec.kind is not str:
            return spec.kind(value)
        if isinstance(spec.kind, type) and not isinstance(value, spec.kind):
            if spec.kind is float and isinstance(value, int):
                return float(value)
            raise ValueError(f"expected {spec.kind.__name__}")
    except (ValueError, TypeError) as error:
        problems.append(Problem(spec.option, value, f"cannot be read ({error})", "see --help for the form"))
        return spec.default
    return value
