"""Which patches can share a target, and in which order they are applied."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed.errors import ConflictError
from mindspeed.patching.patch import Operation, Patch

if TYPE_CHECKING:
    from mindspeed.patching.ledger import Row
    from mindspeed.patching.plan import Step

_EXCLUSIVE = (Operation.REPLACE, Operation.SET, Operation.ADD)
_STAGE = {Operation.ADD: 0, Operation.SET: 0, Operation.REWRITE: 1, Operation.REPLACE: 2, Operation.WRAP: 3}
EVERYBODY = "*"


def is_layer(owner: str) -> bool:
    """Whether an owner is part of the ground (`platform.cpu`, `repair.x`) and not a feature that users choose."""
    return "." in owner


def who(patch: Patch | Row) -> str:
    """Owner and the flag that caused it, for messages."""
    return f"{patch.owner!r} ({patch.flag})" if patch.flag else f"{patch.owner!r}"


def without_superseded(steps: Sequence[Step]) -> tuple[list[Step], list[Patch]]:
    """Drop replacements that another patch of the same target declares to supersede."""
    beaten = [
        step
        for step in steps
        if step.patch.operation is not Operation.WRAP
        and any(step.patch.owner in other.patch.supersedes and other.key == step.key and other is not step for other in steps)
    ]
    return [step for step in steps if step not in beaten], [step.patch for step in beaten]


def problems_between(steps: Sequence[Step], rows: Iterable[Row] = ()) -> list[str]:
    """A line for each pair of patches that cannot be combined, among `steps` and with changes in force."""
    claimed = _claimed(rows)
    lines: list[str] = []
    groups: dict[Any, list[Step]] = defaultdict(list)
    for step in steps:
        groups[step.key].append(step)
    for group in groups.values():
        for index, first in enumerate(group):
            lines += [line for second in group[index + 1 :] if (line := _clash(first.patch, second.patch, second.found.target))]
        lines += _claimed_already(group, claimed)
    lines += _hidden_methods(steps)
    return list(dict.fromkeys(lines))


def _clash(first: Patch, second: Patch, target: str) -> str:
    operations = {first.operation, second.operation}
    pair = f"features {who(first)} and {who(second)}"
    if operations <= set(_EXCLUSIVE):
        if first.value is second.value or (Operation.REPLACE not in operations and _equal(first.value, second.value)):
            return ""
        verb = first.operation.value if len(operations) == 1 else f"{first.operation.value} and {second.operation.value}"
        return f"{pair} both {verb} {target}; use one of them"
    if operations == {Operation.REPLACE, Operation.REWRITE}:
        return f"{pair} replace {target} and rewrite its constants; use one of them"
    if operations == {Operation.REWRITE}:
        shared = [key for key in first.value if key in second.value and first.value[key] != second.value[key]]
        return f"{pair} rewrite the constant {shared[0]!r} of {target} differently; use one of them" if shared else ""
    if operations == {Operation.WRAP} and first.owner != second.owner and not _order_known(first, second):
        return f"{pair} both wrap {target} and neither says which goes outside; one must declare after=({first.owner!r},)"
    return ""


def _equal(first: Any, second: Any) -> bool:
    try:
        return type(first) is type(second) and bool(first == second)
    except (ValueError, RuntimeError):  # arrays and tensors have no single truth
        return False


def _order_known(first: Patch, second: Patch) -> bool:
    if is_layer(first.owner) or is_layer(second.owner):
        return True
    return bool({second.owner, EVERYBODY} & set(first.after) or {first.owner, EVERYBODY} & set(second.after))


def _claimed(rows: Iterable[Row]) -> dict[Any, list[Row]]:
    """Changes in force that exclude others, by the object and by the place they concern."""
    claimed: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row.operation in ("replace", "rewrite", "set", "add"):
            claimed[id(row.base)].append(row)
            for edit in row.edits[:1]:
                claimed[edit.place.identity].append(row)
    return claimed


def _claimed_already(group: Sequence[Step], claimed: Mapping[Any, list[Row]]) -> list[str]:
    """Replacing what a change in force has replaced or rewritten already."""
    lines = []
    for step in group:
        patch, found = step.patch, step.found
        if patch.operation is Operation.WRAP:
            continue
        by_place = found.kind in ("data", "missing") or found.inherited
        key: Any = (id(found.owner_object), found.attribute) if by_place else id(step.base)
        for row in claimed.get(key, ()):
            same_value = row.advice is patch.value or _equal(row.advice, patch.value)
            if (
                row.owner == patch.owner
                or row.owner in patch.supersedes
                or (same_value and row.operation == patch.operation.value)
            ):
                continue
            if row.operation == "rewrite" and patch.operation is Operation.REWRITE and not set(row.advice) & set(patch.value):
                continue
            lines.append(
                f"{who(patch)} cannot {patch.operation.value} {found.target}: {who(row)} did so before ({row.operation})"
            )
    return lines


def _hidden_methods(steps: Sequence[Step]) -> list[str]:
    """A class replaced by one feature while another patches a method of it that the new class does not run."""
    lines = []
    for replacing in steps:
        if replacing.patch.operation is not Operation.REPLACE or replacing.found.kind != "class":
            continue
        old, new = replacing.found.value, replacing.patch.value
        for patching in steps:
            attribute = patching.found.attribute
            if patching.found.owner_object is not old or patching is replacing:
                continue
            if not issubclass(new, old):
                how = f"{new.__qualname__}, which does not derive from it"
            elif attribute in vars(new) and not _calls_super(vars(new)[attribute]):
                how = f"{new.__qualname__}, which overrides {attribute} without calling it"
            else:
                continue
            lines.append(
                f"features {who(replacing.patch)} and {who(patching.patch)} cannot be combined: the first replaces "
                f"{replacing.found.target} by {how}, the second patches {patching.found.target}; use one of them"
            )
    return lines


def _calls_super(value: Any) -> bool:
    code = getattr(inspect.unwrap(getattr(value, "__func__", value)), "__code__", None)
    return code is not None and "super" in code.co_names


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Order of application: data and constants, replacements, then wraps from the inside out.

    Raises:
        ConflictError: the declared orders of wraps contradict each other.
    """
    groups: dict[Any, list[Step]] = defaultdict(list)
    for step in steps:
        groups[step.key].append(step)
    ordered: list[Step] = []
    for group in groups.values():
        ordered += sorted((step for step in group if step.patch.operation is not Operation.WRAP), key=_stage)
        ordered += _nested([step for step in group if step.patch.operation is Operation.WRAP])
    return sorted(ordered, key=_stage)


def _stage(step: Step) -> int:
    return _STAGE[step.patch.operation]


def _nested(wraps: list[Step]) -> list[Step]:
    """Wraps of one target from the innermost to the outermost."""
    rank = {id(step): (not is_layer(step.patch.owner), EVERYBODY in step.patch.after, step.patch.owner) for step in wraps}
    waiting = sorted(wraps, key=lambda step: rank[id(step)]) if len({s.patch.owner for s in wraps}) > 1 else list(wraps)
    ordered: list[Step] = []
    while waiting:
        for step in waiting:
            inner = {other.patch.owner for other in waiting if other.patch.owner != step.patch.owner}
            if not inner & set(step.patch.after):
                ordered.append(step)
                waiting.remove(step)
                break
        else:
            names = ", ".join(f"{who(step.patch)} after {step.patch.after}" for step in waiting)
            raise ConflictError(f"the order of wraps of {waiting[0].found.target} is circular: {names}")
    return ordered
