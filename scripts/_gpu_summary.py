"""Joins the results of gpu_check.sh: prints one table, writes summary.json, and exits as the whole run does."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _gpu_tests import read

STOPPED = (124, 130, 137)
"""Exit codes of a part that ran out of time."""


def tests_of(folder: Path, code: int) -> dict[str, Any]:
    """Counts and failures of the tests; `code` is the exit code of `_gpu_tests.py`."""
    logs = [read(path) for path in sorted(folder.glob("tests-*.jsonl"))]
    rows = {name: row for results, _, _ in logs for name, row in results.items()}
    counts = Counter(row["outcome"] for row in rows.values())
    return {
        "code": code,
        "passed": counts["passed"],
        "failed": {name: row["message"] for name, row in rows.items() if row["outcome"] == "failed"},
        "skipped": counts["skipped"],
        "running": [name for _, open_tests, _ in logs for name in open_tests],
        "slowest": sorted(((row["seconds"], name) for name, row in rows.items()), reverse=True)[:10],
        "finished": bool(logs) and code not in STOPPED,
    }


def figures_of(path: Path, code: int) -> dict[str, Any]:
    """The benchmark report as far as it came, or nothing but the exit code."""
    report: dict[str, Any] = {"cases": []}
    if path.is_file():
        with contextlib.suppress(json.JSONDecodeError):  # stopped while it was written
            report = json.loads(path.read_text())
    return {"code": code, "finished": code not in STOPPED, **report}


CEILINGS = {"H200": (4300.0, 785.0)}
"""Copy in GB/s and bfloat16 matrix product in TFLOP/s that were measured on a healthy device, by words of its name."""


def ceilings_of(figures: dict[str, Any], gpu: str) -> tuple[str, bool]:
    """What the device reached, and whether that is more than 10 % away from what such a device should."""
    found = figures.get("ceilings") or {}
    if not found:
        return "not measured", False
    reached = found["copy_GBps"], found["matmul_TFLOPs"]["bf16"]
    expected = next((value for name, value in CEILINGS.items() if name in gpu), reached)
    odd = any(abs(own / wanted - 1) > 0.1 for own, wanted in zip(reached, expected, strict=True))
    return f"copy {reached[0]:.0f} GB/s, bfloat16 product {reached[1]:.0f} TFLOP/s" + ("; odd machine" if odd else ""), odd


def overall(tests: dict[str, Any], figures: dict[str, Any]) -> int:
    """Exit code of the run: a wrong result, a failure and what could not run count in this order."""
    if figures["code"] == 3:
        return 3
    if tests["failed"] or figures["code"] == 1:
        return 1
    return 0 if tests["code"] == figures["code"] == 0 else 2


def main() -> None:
    """`_gpu_summary.py FOLDER GPU TEST_CODE BENCHMARK_CODE SECONDS`."""
    folder, gpu, test_code, figure_code, seconds = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
    tests, figures = tests_of(folder, test_code), figures_of(folder / "benchmarks.json", figure_code)
    code, (ceilings, odd) = overall(tests, figures), ceilings_of(figures, gpu)
    summary = {"gpu": gpu, "odd_machine": odd, "seconds": seconds, "code": code, "tests": tests, "benchmarks": figures}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    rows = [
        ("device", gpu),
        ("ceilings", ceilings),
        ("tests", f"{tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped" + _late(tests)),
        *_failures(tests["failed"]),
        *(("  running", name) for name in tests["running"]),
        ("benchmarks", f"{len(figures['cases'])} cases, exit code {figure_code}" + _late(figures)),
        *((f"  {case.get('verdict')}", _figure(case)) for case in figures["cases"] if _is_told(case)),
        ("seconds", str(seconds)),
        ("result", {0: "ok", 1: "failed", 2: "incomplete", 3: "wrong result"}[code] + f" ({folder / 'summary.json'})"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    sys.exit(code)


MOST_LINES = 25


def _failures(failed: dict[str, str]) -> Iterator[tuple[str, str]]:
    """One line for each different message, with the number of tests that gave it and the first of them."""
    by_message: dict[str, list[str]] = {}
    for name, message in failed.items():
        by_message.setdefault(message, []).append(name)
    for message, names in sorted(by_message.items(), key=lambda item: -len(item[1]))[:MOST_LINES]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield "  failed", f"{names[0]}{more}: {message}"


def _is_told(case: dict[str, Any]) -> bool:
    """Cases of other devices are not."""
    return case.get("verdict") != "skipped" or "only" not in str(case.get("reason"))


def _figure(case: dict[str, Any]) -> str:
    """Id, figure, fraction of what is possible, its bounds, and the peers' share of it."""
    parts = [f"{case['id']:<44}"]
    if case.get("ours") is not None:
        parts.append(f"{case['ours']:10.4f} {case['unit'].rpartition(' ')[2]}")
    if case.get("fraction") is not None:
        parts.append(f"fraction {case['fraction']:.2f} (must {case.get('must')}, aim {case.get('aim')})")
    peers = [f"{name} x{peer['ratio']:.2f}" for name, peer in case.get("peers", {}).items() if peer.get("ratio") is not None]
    return "  ".join([*parts, *peers, *filter(None, [case.get("reason")])])


def _late(part: dict[str, Any]) -> str:
    return "" if part["finished"] else "; stopped by the time limit"


if __name__ == "__main__":
    main()
