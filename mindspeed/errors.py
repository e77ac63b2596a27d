"""Errors a user can meet, each of which says what was given, which rule it broke and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class MindspeedError(Exception):
    """Base of every error raised on purpose by this library."""


@dataclass(frozen=True)
class Problem:
    """One violated rule: `flag value: rule; fix`."""

    flag: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        given = "" if self.value is None or self.value is True else f" {self.value}"
        return f"{self.flag}{given}: {self.rule}. {self.fix[:1].upper()}{self.fix[1:]}."


class ConfigError(MindspeedError, ValueError):
    """The run as described cannot be honoured; carries every `Problem` found, not just the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} with this configuration:"
        super().__init__("\n".join([head, *(f"  {index}. {problem}" for index, problem in enumerate(self.problems, 1))]))


class TargetError(MindspeedError):
    """A patch target is absent from, or differs in, the installed host."""


class ConflictError(MindspeedError):
    """Two features claim one target in ways that cannot be combined."""


class LedgerError(MindspeedError):
    """A patch cannot be undone because somebody else changed its target afterwards."""


class PlatformError(MindspeedError, RuntimeError):
    """The chosen platform is absent or cannot do what was asked."""


class CheckpointError(MindspeedError, RuntimeError):
    """A checkpoint is missing, incomplete, damaged or does not fit the run."""


class DataError(MindspeedError, ValueError):
    """A data file or tokenizer is missing, damaged or does not fit the run."""
