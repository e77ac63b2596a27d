"""What people see of an activation: which features are on, why, and what they change."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mindspeed.patching.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mindspeed.ops import Ran
    from mindspeed.patching.activation import Active

_MOST_TARGETS = 6


def is_first_rank() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def changes_by_owner(ledger: Ledger) -> dict[str, list[str]]:
    """Owner -> short names of what it changed."""
    changes: dict[str, list[str]] = {}
    for row in ledger.rows:
        changes.setdefault(row.owner, []).append(f"{row.operation} {row.target.partition(':')[2]}")
    return changes


def feature_table(active: Iterable[Active], changes: Mapping[str, list[str]]) -> Table:
    """One row per feature that is on."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="mindspeed features that are on", title_justify="left")
    for heading in ("feature", "because", "changes"):
        table.add_column(heading, overflow="fold")
    for one in active:
        lines = changes.get(one.name, [])
        more = [f"and {len(lines) - _MOST_TARGETS} more"] if len(lines) > _MOST_TARGETS else []
        table.add_row(
            Text(one.name, style="bold"),
            Text(one.why),
            Text("\n".join([*lines[:_MOST_TARGETS], *more]) or "acts at the host's events"),
        )
    return table


def show(active: Iterable[Active], ledger: Ledger, args: argparse.Namespace, console: Console | None = None) -> None:
    """Print the table, the derived values, and with `--log-patches` the whole ledger; on the first rank only."""
    from rich.console import Console

    active = list(active)
    if not is_first_rank():
        return
    console = console or Console(width=None if os.isatty(1) else 140, highlight=False)
    if active:
        console.print(feature_table(active, changes_by_owner(ledger)))
    if rows := operator_rows(active):
        console.print(operator_table(rows))
    for line in getattr(getattr(args, "mindspeed", None), "derived", ()):
        console.print(line, markup=False)
    if getattr(args, "log_patches", False):
        console.print(str(ledger), markup=False)


def operator_rows(active: Iterable[Active]) -> list[tuple[str, str, Ran]]:
    """(feature, operator, what serves it) for the operators that features which are on name in `operators`."""
    wanted = [(one.name, name) for one in active for name in getattr(one.feature, "operators", ())]
    if not wanted:
        return []
    from mindspeed.ops import backend_report
    from mindspeed.platform import current

    report = backend_report(current().device_type)
    return [(feature, name, _before_any_call(report[name])) for feature, name in wanted]


def _before_any_call(ran: Ran) -> Ran:
    """The report's row without what is plain here: that nothing has run yet."""
    reason = ran.reason.removesuffix("; not called yet")
    if reason == "first choice":
        plain = ran.kernel == "ref"
        reason = f"plain torch: no faster body for {ran.device}" if plain else f"first of the bodies for {ran.device}"
    return ran._replace(reason=reason)


def operator_table(rows: Iterable[tuple[str, str, Ran]]) -> Table:
    """One row an operator: whose it is, which kernel serves it, and why that one."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Kernels that serve them", title_justify="left")
    for heading in ("feature", "operator", "device", "kernel", "because"):
        table.add_column(heading, overflow="fold")
    for feature, name, ran in rows:
        table.add_row(feature, name, ran.device, Text(ran.kernel, style="bold"), ran.reason)
    return table
