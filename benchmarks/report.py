"""`python -m benchmarks.report FILE...`: reports as Markdown tables for the documentation."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks._report import read_report
from benchmarks._table import number


def markdown(report: dict[str, Any]) -> str:
    """One table of all cases with figures, under a line that says where they come from."""
    machine, versions = report["machine"], report["versions"]
    source = (
        f"{machine['device']} on {machine['cpu']} ({machine['isa']}), torch {versions['torch']}, commit {report['commit'][:10]}"
    )
    lines = [source, "", "| case | workload | ours | fraction of the floor | peers / ours | rounds, spread | verdict |"]
    lines.append("|---|---|---|---|---|---|---|")
    for entry in report["cases"]:
        if entry["ours"] is None:
            continue
        workload = ", ".join(f"{name}={value}" for name, value in entry["workload"].items())
        ratios = (f"{name} ×{peer['ratio']:.2f}" for name, peer in entry["peers"].items() if peer["ratio"] is not None)
        repeated = f"{entry['rounds']}, {entry['spread'] or 0:.0%}"
        cells = [f"`{entry['id']}`", workload, f"{number(entry['ours'])} {entry['unit']}", number(entry["fraction"])]
        lines.append(f"| {' | '.join([*cells, ', '.join(ratios), repeated, entry['verdict']])} |")
    return "\n".join(lines) + "\n"


def main(paths: list[str]) -> int:
    """Print the tables of all files."""
    if not paths:
        print("usage: python -m benchmarks.report FILE...", file=sys.stderr)
        return 2
    for path in paths:
        print(markdown(read_report(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
