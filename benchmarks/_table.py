"""Terminal tables and plots of results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._case import Case, Run

_COLOURS = {
    "aim": "bold green", "ok": "green", "missed": "red", "noisy": "yellow", "info": "cyan", "WRONG": "bold red",
    "skipped": "dim", "failed": "bold red", "hung": "bold red", "worse": "red", "better": "green", "same": "dim",
}  # fmt: skip


def show_list(console: Console, cases: Iterable[Case], run: Run) -> None:
    """What there is, without running anything."""
    table = Table(title="benchmark cases", title_justify="left")
    for column in ("case", "feature", "metric", "must", "aim", "clock", "preset", "devices", "measures"):
        table.add_column(column, overflow="fold")
    for case in cases:
        metric = f"ratio to {case.against}" if case.metric == "ratio" else f"{case.metric}, {case.better}"
        bounds = (number(case.must), number(case.aim))
        devices = ", ".join(case.devices)
        table.add_row(case.id, case.feature, metric, *bounds, case.unit, case.preset, devices, case.summary)
    console.print(table)


def show_results(console: Console, group: str, entries: list[dict[str, Any]]) -> None:
    """One table for a group, peers side by side."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["peers"]))
    table = Table(title=group, title_justify="left")
    for column in ("case", "ours", "floor", "frac", *names, "must", "aim", "spread", "verdict"):
        table.add_column(column, overflow="fold", justify="left" if column in ("case", "verdict") else "right")
    for entry in entries:
        peers = [_peer(entry["peers"].get(name)) for name in names]
        spread = "" if entry["spread"] is None else f"{entry['spread']:.0%}"
        ours = "" if entry["ours"] is None else f"{number(entry['ours'])} {entry['unit']}"
        row = [entry["id"], ours, number(entry["floor"]), number(entry["fraction"]), *peers]
        colour = _COLOURS[entry["verdict"]]
        table.add_row(*row, number(entry["must"]), number(entry["aim"]), spread, f"[{colour}]{entry['verdict']}[/]")
    console.print(table)
    for entry in entries:
        if entry["reason"]:
            console.print(f"{entry['id']} {entry['verdict']}: {entry['reason']}", markup=False, highlight=False)


def show_comparison(console: Console, rows: list[dict[str, Any]]) -> None:
    """Before and now."""
    table = Table(title="against the earlier report", title_justify="left")
    for column in ("case", "before", "now", "verdict"):
        table.add_column(column)
    for row in rows:
        verdict = f"[{_COLOURS[row['verdict']]}]{row['verdict']}[/]"
        table.add_row(row["id"], number(row["before"]), number(row["now"]), verdict)
    console.print(table)


def number(value: float | None) -> str:
    """Three significant digits; whole numbers as they are."""
    if value is None:
        return ""
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.3g}"


def _peer(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    return f"×{peer['ratio']:.2f}" if peer["ratio"] is not None else f"[dim]{peer['status']}[/]"


def plot_group(directory: Path, group: str, entries: list[dict[str, Any]]) -> Path | None:
    """Bars of the fraction of the floor and of the ratio to every peer; None without figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [entry for entry in entries if entry["ours"] is not None]
    if not shown:
        return None
    names = list(dict.fromkeys(name for entry in shown for name in entry["peers"]))
    series = {"fraction of the floor": [entry["fraction"] or 0.0 for entry in shown]}
    series |= {f"{name} / ours": [entry["peers"].get(name, {}).get("ratio") or 0.0 for entry in shown] for name in names}
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.25 * len(shown) * len(series)))
    height = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        axes.barh([row + index * height for row in range(len(shown))], values, height, label=label)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(shown))], [entry["id"] for entry in shown])
    axes.invert_yaxis()
    axes.set_title(group)
    axes.legend(fontsize="small")
    figure.tight_layout()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{group}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
