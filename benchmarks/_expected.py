"""Counted figures as they were last accepted: `benchmarks/expected/<group>.json`, one number a case.

    python -m benchmarks._expected          # writes the files anew; a change commits them and says why

The test suite counts again and compares, so that a message, a byte or a visited score more does not slip in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks._case import Case, Counted, Run, cases_of, groups

FOLDER = Path(__file__).parent / "expected"
EXACT = {"bytes", "calls", "layers", "messages", "scores"}
"""Units of what is counted in whole numbers."""


def exact_cases() -> Iterator[Case]:
    """Cases whose figure is the same on every machine, without those of the full preset, which take many ranks."""
    cases = cases_of(module for found in groups().values() for module in found)
    return (case for case in cases if case.unit in EXACT and case.preset != "full")


def counted(case: Case) -> float:
    """Run the case; its figure.

    Raises:
        ValueError: its result is wrong.
    """
    work = case.function(Run(preset="smoke"))
    if not isinstance(work, Counted) or not work.check.ok:
        raise ValueError(f"{case.id} returned {work}")
    return work.ours


def accepted() -> dict[str, float]:
    """Figure of every case, by id."""
    files = sorted(FOLDER.glob("*.json"))
    return {case: figure for file in files for case, figure in json.loads(file.read_text()).items()}


def write() -> None:
    """Count everything and write the files."""
    found: dict[str, dict[str, float]] = {}
    for case in exact_cases():
        found.setdefault(case.group, {})[case.id] = counted(case)
    FOLDER.mkdir(exist_ok=True)
    for group, figures in found.items():
        (FOLDER / f"{group}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    from mindspeed.testing.pool import pools

    try:
        write()
    finally:
        pools().close()
