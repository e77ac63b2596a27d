"""Our flags in Megatron-LM's YAML arguments: the host replaces its whole namespace by the file."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Iterable
from typing import Any

from mindspeed.errors import ConfigError, Problem
from mindspeed.patching.activation import EngineFlags
from mindspeed.patching.feature import Feature
from mindspeed.patching.flags import FlagSpec, flag_specs

SECTION = "mindspeed"
_SHARED_SECTIONS = ("language_model", "model_parallel")


def merge(args: Any, parser: argparse.ArgumentParser, features: Iterable[Feature], given: Collection[str]) -> None:
    """Give the namespace of a YAML file all flags of ours.

    From weak to strong: defaults; names at the top level or in the host's sections; the section
    `mindspeed:`; flags that stand on the command line. Dashes and underscores are the same in names.

    Raises:
        ConfigError: unknown names in the section `mindspeed:`.
    """
    specs = {spec.dest: spec for holder in (EngineFlags, *(f.flags for f in features)) for spec in flag_specs(holder)}
    values = {dest: spec.default for dest, spec in specs.items()}
    for place in (args, *(getattr(args, section, None) for section in _SHARED_SECTIONS)):
        values.update({_dest(name): value for name, value in _items(place) if _dest(name) in specs})
    values.update(_own_section(args, specs))
    if set(specs) & set(given):
        spoken = parser.parse_known_args(sys.argv[1:])[0]
        values.update({dest: getattr(spoken, dest) for dest in specs if dest in given})
    for dest, value in values.items():
        setattr(args, dest, value)


def _own_section(args: Any, specs: dict[str, FlagSpec]) -> dict[str, Any]:
    section = dict(_items(getattr(args, SECTION, None)))
    if hasattr(args, SECTION):
        delattr(args, SECTION)
    problems = []
    for name in section:
        if _dest(name) not in specs:
            near = difflib.get_close_matches(_dest(name), specs, n=3, cutoff=0.5)
            fix = f"did you mean {' or '.join(near)}" if near else "see --help for all names"
            problems.append(Problem(f"{SECTION}: {name}", None, "is not a flag of mindspeed", fix))
    if problems:
        raise ConfigError(problems)
    return {_dest(name): value for name, value in section.items()}


def _items(place: Any) -> Iterable[tuple[str, Any]]:
    return () if place is None else vars(place).items()


def _dest(name: str) -> str:
    return name.replace("-", "_")
