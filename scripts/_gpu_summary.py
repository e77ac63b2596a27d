"""Joins the results of gpu_check.sh: prints one table, writes summary.json, and exits as the whole run does."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

STOPPED = (124, 130, 137)
"""Exit codes of a part that ran out of time."""


def tests_of(path: Path, code: int) -> dict[str, object]:
    """Counts and failures of a JUnit report; `code` is pytest's exit code."""
    if not path.is_file():
        return {"code": code, "passed": 0, "failed": [], "skipped": 0, "finished": False}
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "code": code,
        "passed": len(cases) - len(failed) - skipped,
        "failed": failed,
        "skipped": skipped,
        "finished": code not in STOPPED,
    }


def figures_of(path: Path, code: int) -> dict[str, object]:
    """The benchmark report, or nothing but the exit code if there is none."""
    report = json.loads(path.read_text()) if path.is_file() else {"cases": []}
    return {"code": code, "finished": code not in STOPPED, **report}


CEILINGS = {"H200": (4300.0, 785.0)}
"""Copy in GB/s and bfloat16 matrix product in TFLOP/s that were measured on a healthy device, by words of its name."""


def ceilings_of(figures: dict[str, object], gpu: str) -> tuple[str, bool]:
    """What the device reached, and whether that is more than 10 % away from what such a device should."""
    found = figures.get("ceilings") or {}
    if not found:
        return "not measured", False
    reached = found["copy_GBps"], found["matmul_TFLOPs"]["bf16"]
    expected = next((value for name, value in CEILINGS.items() if name in gpu), reached)
    odd = any(abs(own / wanted - 1) > 0.1 for own, wanted in zip(reached, expected, strict=True))
    return f"copy {reached[0]:.0f} GB/s, bfloat16 product {reached[1]:.0f} TFLOP/s" + ("; odd machine" if odd else ""), odd


def overall(tests: dict[str, object], figures: dict[str, object]) -> int:
    """Exit code of the run: a wrong result, a failure and what could not run count in this order."""
    if figures["code"] == 3:
        return 3
    if tests["failed"] or figures["code"] == 1:
        return 1
    return 0 if tests["code"] == figures["code"] == 0 else 2


def main() -> None:
    """`_gpu_summary.py FOLDER GPU TEST_CODE BENCHMARK_CODE SECONDS`."""
    folder, gpu, test_code, figure_code, seconds = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
    tests, figures = tests_of(folder / "tests.xml", test_code), figures_of(folder / "benchmarks.json", figure_code)
    code, (ceilings, odd) = overall(tests, figures), ceilings_of(figures, gpu)
    (folder / "summary.json").write_text(
        json.dumps(
            {"gpu": gpu, "odd_machine": odd, "seconds": seconds, "code": code, "tests": tests, "benchmarks": figures}, indent=1
        )
    )
    rows = [
        ("device", gpu),
        ("ceilings", ceilings),
        ("tests", f"{tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped" + _late(tests)),
        *(("  failed", name) for name in tests["failed"][:20]),
        ("benchmarks", f"{len(figures['cases'])} cases, exit code {figure_code}" + _late(figures)),
        *(
            ("  " + str(case.get("verdict")), case["id"])
            for case in figures["cases"]
            if case.get("verdict") not in ("aim", "ok", "noisy", "info", "skipped")
        ),
        ("seconds", str(seconds)),
        ("result", {0: "ok", 1: "failed", 2: "incomplete", 3: "wrong result"}[code] + f" ({folder / 'summary.json'})"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    sys.exit(code)


def _late(part: dict[str, object]) -> str:
    return "" if part["finished"] else "; stopped by the time limit"


if __name__ == "__main__":
    main()
