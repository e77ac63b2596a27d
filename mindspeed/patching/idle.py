"""Flags that were given and change nothing, because every feature that they belong to is off."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from mindspeed.patching.activation import Active, off
from mindspeed.patching.feature import Feature


@dataclass(frozen=True)
class IdleFlag:
    """A flag with a value that nobody looks at."""

    option: str
    feature: str
    switch: str

    @property
    def because(self) -> str:
        """Which feature is off, and what would turn it on."""
        how = f"; it needs {self.switch}" if self.switch else ""
        return f"the feature {self.feature} is off{how}"

    def __str__(self) -> str:
        return f"{self.option} has no effect because {self.because}"


def idle_flags(features: Iterable[Feature], active: Iterable[Active], args: argparse.Namespace) -> list[IdleFlag]:
    """Flags with another value than their default that belong only to features that are off.

    A flag that a host has too is never idle, nor one that a feature shares with another that is on.
    """
    active = list(active)
    read = {spec.dest for one in active for spec in one.feature.specs}
    found: dict[str, IdleFlag] = {}
    for feature, flags in off(features, active, args):
        for spec in feature.specs:
            value = getattr(flags, spec.dest)
            if value != spec.default and spec.dest not in read and not spec.of_host:
                option = spec.option if spec.is_switch else f"{spec.option} {value}"
                found.setdefault(spec.dest, IdleFlag(option, feature.name, feature.switch))
    return list(found.values())
