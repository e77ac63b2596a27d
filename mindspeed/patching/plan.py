"""From patches to a verified plan, and from a plan to changes that are complete or not there at all.

plan = Plan.of(patches, host_versions=versions())     # resolves, checks, orders; changes nothing
plan.apply(ledger)                                    # all of it, or an exception and none of it
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed.errors import ConflictError, TargetError
from mindspeed.patching import fingerprints
from mindspeed.patching.aliases import Place, can_have_aliases, default_places, find
from mindspeed.patching.callables import functions_with, original_of, replaced, wrapped
from mindspeed.patching.conflicts import in_order, is_layer, problems_between, who, without_superseded
from mindspeed.patching.ledger import LOCK, Edit, Ledger, Row
from mindspeed.patching.patch import Operation, Patch
from mindspeed.patching.resolve import MISSING, Resolved, plain, resolve
from mindspeed.patching.versions import SUPPORTED, host_versions

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Step:
    """A patch and what its target names."""

    patch: Patch
    found: Resolved

    @property
    def base(self) -> Any:
        """The object that was there before any patch: two steps with the same base concern the same thing."""
        return original_of(self.found.value)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two steps that concern the same thing, under whatever names."""
        if self.found.kind in ("data", "missing") or self.found.inherited:
            return id(self.found.owner_object), self.found.attribute
        return (id(self.base),)


@dataclass(frozen=True, eq=False)
class Plan:
    """Resolved, verified and ordered patches.

    Attributes:
        steps: in the order of application.
        superseded: patches left out because another one declares to supersede them.
    """

    steps: tuple[Step, ...]
    superseded: tuple[Patch, ...] = ()

    @classmethod
    def of(
        cls, patches: Iterable[Patch], *, host_versions: Mapping[str, str] | None = None, ledger: Ledger | None = None
    ) -> Plan:
        """Resolve all targets and look for conflicts; nothing is changed.

        Args:
            patches: with owner (and flag) filled in.
            host_versions: distribution -> version found, for messages; looked up by default.
            ledger: changes in force, which count as claims too.

        Raises:
            TargetError: naming every target that is absent or of the wrong kind.
            ConflictError: naming every pair of patches that cannot be combined.
        """
        rows = ledger.rows if ledger is not None else ()
        steps = _resolved(_without_repeats(patches, rows), rows, host_versions)
        steps, superseded = without_superseded(steps)
        if lines := problems_between(steps, rows):
            raise ConflictError("\n".join(lines))
        return cls(tuple(in_order(steps)), tuple(superseded))

    @property
    def targets(self) -> dict[str, list[str]]:
        """Owner -> targets it changes."""
        targets: dict[str, list[str]] = defaultdict(list)
        for step in self.steps:
            if step.found.target not in targets[step.patch.owner]:
                targets[step.patch.owner].append(step.found.target)
        return dict(targets)

    def apply(self, ledger: Ledger) -> None:
        """Make the changes and record them; an exception leaves the host and the ledger as they were."""
        with LOCK:
            if lines := problems_between(self.steps, ledger.rows):
                raise ConflictError("\n".join(lines))
            claims = _claims(ledger.rows)
            steps = [step for step in self.steps if not _is_among(step.patch, claims.get(_claim(step.patch), ()))]
            places = _References([step for step in steps if step.patch.operation in (Operation.WRAP, Operation.REPLACE)])
            made: list[Row] = []
            try:
                for step in steps:
                    row = _row_for(step, ledger)
                    made.append(row)
                    ledger.keep(row)
                    _APPLY[step.patch.operation](step, row, places)
            except BaseException:
                ledger.revert_rows(made, force=True)
                raise
        for patch in self.superseded:
            _log.warning(
                "%s of %s by %s gives way to a feature that supersedes it", patch.operation.value, patch.target, who(patch)
            )

    @contextlib.contextmanager
    def applied(self) -> Iterator[Ledger]:
        """Apply to a ledger of its own for the time of a block."""
        ledger = Ledger()
        self.apply(ledger)
        try:
            yield ledger
        finally:
            ledger.revert()


def _claim(patch: Patch) -> tuple[str, str, str]:
    return patch.owner, patch.operation.value, patch.target.replace(":", ".")


def _claims(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Any]]:
    """(owner, operation, target) -> values of changes in force."""
    claims: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for row in rows:
        claims[row.owner, row.operation, row.target.replace(":", ".")].append(row.advice)
    return claims


def _is_among(patch: Patch, values: Iterable[Any]) -> bool:
    return any(value is patch.value or (patch.operation is Operation.REWRITE and value == patch.value) for value in values)


def _without_repeats(patches: Iterable[Patch], rows: Iterable[Row]) -> list[Patch]:
    """Each patch once: a feature may name the same advice for the same target twice, or again."""
    claims = _claims(rows)
    kept: list[Patch] = []
    for patch in patches:
        values = claims.setdefault(_claim(patch), [])
        if not _is_among(patch, values):
            values.append(patch.value)
            kept.append(patch)
    return kept


def _resolved(patches: Iterable[Patch], rows: Iterable[Row], installed: Mapping[str, str] | None) -> list[Step]:
    originals = {id(row.advice): row.base for row in rows if row.operation == "replace" and isinstance(row.base, type)}
    steps: list[Step] = []
    lines: list[str] = []
    for patch in patches:
        try:
            found = resolve(patch.target, allow_missing=patch.operation is Operation.ADD, originals=originals)
            _verify(patch, found)
            steps.append(Step(patch, found))
        except TargetError as error:
            before = {who(row) for row in rows if row.target.replace(":", ".") == patch.target.replace(":", ".")}
            claimed = f"; it was changed before by {', '.join(sorted(before))}" if before else ""
            lines.append(f"{_who(patch)} cannot {patch.operation.value} {patch.target}: {error}{claimed}")
    if lines:
        found_versions = ", ".join(f"{name} {version}" for name, version in (installed or host_versions()).items())
        supported = ", ".join(f"{name} {version}" for name, version in SUPPORTED.items())
        raise TargetError("\n".join([*lines, f"Installed: {found_versions}. Supported: {supported}."]))
    fingerprints.verify(((_who(step.patch), step.found) for step in steps), next(iter(SUPPORTED.values())))
    return steps


def _who(patch: Patch) -> str:
    return who(patch) if is_layer(patch.owner) else f"feature {who(patch)}"


def _verify(patch: Patch, found: Resolved) -> None:
    """Whether the operation makes sense for what was found."""
    if patch.operation is Operation.ADD:
        if found.kind != "missing":
            raise TargetError(f"{found.target} exists already ({found.value!r})")
    elif found.attribute == "__new__" and found.value is object.__new__:
        # Python does not forget that a class once had a __new__: deleting ours would break the constructor.
        raise TargetError(f"{found.target} does not exist ({found.target.rpartition('.')[0]} inherits object's); use __init__")
    elif patch.operation is Operation.WRAP:
        if found.kind == "class":
            raise TargetError(f"{found.target} is a class; wrap its __init__, __new__ or another method instead")
        if not callable(plain(found.value)):
            raise TargetError(f"{found.target} is {type(found.value).__name__} data and cannot be called; use set_value")
    elif patch.operation is Operation.REPLACE and found.kind == "class":
        if not isinstance(patch.value, type):
            raise TargetError(f"{found.target} is a class and {patch.value!r} is not")
        if not patch.unrelated and not issubclass(patch.value, found.value):
            raise TargetError(
                f"{patch.value.__qualname__} does not derive from {found.target}, so isinstance checks would change; "
                "derive from it, patch its methods, or declare unrelated=True"
            )
    elif patch.operation is Operation.REPLACE and found.kind != "data" and not callable(plain(patch.value)):
        raise TargetError(f"{found.target} is a {found.kind} and {patch.value!r} cannot be called")
    elif patch.operation is Operation.REWRITE:
        functions_with(found, patch.value)


class _References:
    """Places of the originals; they follow along when patches stack."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._places = find(item for step in steps for item in _known_as(step.found))

    def move(self, old: Any, new: Any) -> list[Edit]:
        """Re-point every place that shows `old`."""
        edits: list[Edit] = []
        for place in self._places.pop(id(old), ()):
            if place.get() is old:
                place.put(new)
                edits.append(Edit(place, old, new))
        self._places[id(new)] = [edit.place for edit in edits]
        return edits


def _known_as(found: Resolved) -> list[Any]:
    """The objects under which a target may be referred to elsewhere; none for what belongs to another library."""
    if not can_have_aliases(found.value) or found.inherited or _is_foreign(found):
        return []
    inner = plain(found.value)
    return [found.value] if inner is found.value or inner is None else [found.value, inner]


def _is_foreign(found: Resolved) -> bool:
    """A class of torch under a name of the host: other holders of that class mean torch's, not the host's."""
    home = getattr(plain(found.value), "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] != found.module.partition(".")[0]


def _row_for(step: Step, ledger: Ledger) -> Row:
    patch = step.patch
    countable = patch.operation in (Operation.WRAP, Operation.REPLACE)
    return ledger.row(
        operation=patch.operation.value,
        target=step.found.target,
        owner=patch.owner,
        flag=patch.flag,
        reason=patch.reason,
        fingerprint=fingerprints.known(step.found),
        calls=0 if countable else None,
        advice=patch.value,
        base=step.base,
    )


def _apply_callable(step: Step, row: Row, places: _References) -> None:
    """Wrap or replace: the target itself first, then every other place that shows the old object."""
    found, patch = step.found, step.patch
    place = Place(found.owner_object, found.attribute, found.target)
    stored = place.get()
    current = found.value if stored is MISSING else stored
    found = dataclasses.replace(found, value=current, inherited=stored is MISSING and isinstance(found.owner_object, type))
    make = wrapped if patch.operation is Operation.WRAP else replaced
    new = make(found, patch.value, row)
    place.put(new)
    row.edits.append(Edit(place, stored, new))
    pairs = [(current, new)]
    if plain(current) is not current and plain(new) is not None:
        pairs.append((plain(current), plain(new)))
    for old_object, new_object in pairs:
        row.edits += places.move(old_object, new_object)
    row.stands_for += [(new_object, old_object) for old_object, new_object in pairs if new_object is not old_object]


def _apply_data(step: Step, row: Row, places: _References) -> None:
    """Set or add: the attribute, and for a dataclass default also the places that hold it."""
    owner, attribute = step.found.owner_object, step.found.attribute
    targets = [Place(owner, attribute, step.found.target)]
    if isinstance(owner, type):
        targets += default_places(owner, attribute)
    for place in targets:
        old = place.get()
        place.put(step.patch.value)
        row.edits.append(Edit(place, old, place.get()))


def _apply_rewrite(step: Step, row: Row, places: _References) -> None:
    for function, code in functions_with(step.found, step.patch.value):
        place = Place(function, "__code__", f"{step.found.target}.__code__")
        row.edits.append(Edit(place, function.__code__, code))
        place.put(code)


_APPLY = {
    Operation.WRAP: _apply_callable,
    Operation.REPLACE: _apply_callable,
    Operation.SET: _apply_data,
    Operation.ADD: _apply_data,
    Operation.REWRITE: _apply_rewrite,
}
