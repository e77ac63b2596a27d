"""The list of every change made to a host, in order, with owner and reason; and the way back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mindspeed.errors import LedgerError
from mindspeed.patching.aliases import Place, find
from mindspeed.patching.resolve import MISSING

# Applying and undoing touch the same places; one thread at a time.
LOCK = threading.RLock()


@dataclass(frozen=True, eq=False)
class Edit:
    """One reference that was changed."""

    place: Place
    old: Any
    new: Any

    @property
    def is_ours(self) -> bool:
        """Whether the reference still shows what we put there."""
        return self.place.get() is self.new


@dataclass(eq=False)
class Row:
    """One change.

    Attributes:
        index: position in the order of application, never reused.
        operation: "wrap", "replace", "set", "rewrite", "add", or "permanent" for what cannot be undone.
        target: canonical text `module:qualname`.
        owner: feature name, or a layer such as "platform.cpu", "repair.<name>", "compat.torch".
        flag: what the user gave that caused it.
        reason: sentence for people who ask why.
        fingerprint: of what was there before, where it had one.
        calls: how often the patch ran; None where calls cannot be counted (data, constants, classes).
    """

    index: int
    operation: str
    target: str
    owner: str
    flag: str = ""
    reason: str = ""
    fingerprint: str = ""
    calls: int | None = None
    advice: Any = field(default=None, repr=False)
    base: Any = field(default=None, repr=False)  # the object that was there before any patch
    edits: list[Edit] = field(default_factory=list, repr=False)
    stands_for: list[tuple[Any, Any]] = field(default_factory=list, repr=False)  # (new, old) objects, for late aliases

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names under which the target was known and is patched."""
        return tuple(edit.place.text for edit in self.edits[1:])

    def __str__(self) -> str:
        calls = "" if self.calls is None else f", called {self.calls}x"
        reason = f": {self.reason}" if self.reason else ""
        because = f" because {self.flag}" if self.flag else ""
        aliases = f" (+{len(self.aliases)} aliases)" if self.aliases else ""
        return f"{self.index:3d} {self.owner}: {self.operation} {self.target}{aliases}{reason}{because}{calls}"


class Ledger:
    """All changes of one process or one activation."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._next = 1

    @property
    def rows(self) -> tuple[Row, ...]:
        """The changes in force, in the order they were made."""
        return tuple(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        return "\n".join(map(str, self._rows)) or "(no changes)"

    def calls(self, target: str, owner: str | None = None) -> int:
        """How often patches of `target` ran (of one owner, or of all).

        Raises:
            LedgerError: there is no patch of that target whose calls are counted.
        """
        wanted = target.replace(":", ".")
        rows = [row for row in self._rows if row.target.replace(":", ".") == wanted and owner in (None, row.owner)]
        if not any(row.calls is not None for row in rows):
            whose = f" by {owner}" if owner else ""
            raise LedgerError(f"no patch of {target}{whose} counts calls; the ledger has:\n{self}")
        return sum(row.calls or 0 for row in rows)

    def row(self, **values: Any) -> Row:
        """A new row, not yet part of the ledger; `keep` adds it."""
        self._next += 1
        return Row(index=self._next - 1, **values)

    def keep(self, row: Row) -> None:
        """Add a row whose edits have been made."""
        self._rows.append(row)

    def note(self, target: str, *, owner: str, reason: str) -> Row:
        """Record a change that was made by other means and cannot be undone."""
        row = self.row(operation="permanent", target=target, owner=owner, reason=reason)
        self.keep(row)
        return row

    def record_set(self, place: Place, value: Any, *, owner: str, reason: str, flag: str = "") -> Row:
        """Write `value` to a place that has no target text, such as an attribute of one instance."""
        with LOCK:
            row = self.row(operation="set", target=place.text, owner=owner, reason=reason, flag=flag)
            edit = Edit(place, place.get(), value)
            place.put(value)
            row.edits.append(edit)
            self.keep(row)
            return row

    def revert(self, force: bool = False) -> None:
        """Undo every change in reverse order; each reference is again the object it was.

        Raises:
            LedgerError: somebody else changed a target after us (nothing is undone then), unless `force`.
        """
        self.revert_owner(lambda owner: True, force=force)

    def revert_owner(self, predicate: Callable[[str], bool], force: bool = False) -> None:
        """Undo the changes of those owners for which `predicate` holds; see `revert`."""
        self.revert_rows((row for row in self._rows if predicate(row.owner)), force=force)

    def revert_rows(self, rows: Iterable[Row], force: bool = False) -> None:
        """Undo some rows, last first; see `revert`."""
        with LOCK:
            leaving = [row for row in rows if row.operation != "permanent"]
            if not force:
                _refuse_if_changed(leaving, self._rows)
            late = find(new for row in leaving for new, _ in row.stands_for)
            for row in reversed(leaving):
                _undo(row, late)
                if row in self._rows:
                    self._rows.remove(row)


def _refuse_if_changed(leaving: list[Row], present: list[Row]) -> None:
    """Check, before anything is undone, that the first place of every row shows what we put there."""
    going = {id(row) for row in leaving}
    lines: list[str] = []
    showing: dict[tuple[int, Any], Any] = {}
    for row in reversed(present):
        for edit in row.edits[:1]:
            key = edit.place.identity
            current = showing.get(key, MISSING) if key in showing else edit.place.get()
            if id(row) not in going:
                if current is edit.new:
                    showing[key] = _Covered(row)
                continue
            if isinstance(current, _Covered):
                lines.append(f"{row.target}: {current.row.owner} patched it after {row.owner}; undo that first")
            elif current is not edit.new:
                lines.append(f"someone else changed {row.target} after us ({row.owner}): it is now {current!r}")
            showing[key] = edit.old
    if lines:
        raise LedgerError("cannot undo; nothing was changed (force=True overrides):\n" + "\n".join(lines))


@dataclass(frozen=True)
class _Covered:
    """A place that still shows a patch which stays."""

    row: Row


def _undo(row: Row, late: dict[int, list[Place]]) -> None:
    for edit in reversed(row.edits):
        # A name that somebody re-bound for his own use stays his; the first place was checked or is forced.
        if edit is row.edits[0] or edit.is_ours:
            if not (edit.old is MISSING and edit.place.get() is MISSING):
                edit.place.put(edit.old)
    for new, old in row.stands_for:
        for place in late.get(id(new), ()):
            if place.get() is new:
                place.put(old)
                late.setdefault(id(old), []).append(place)
