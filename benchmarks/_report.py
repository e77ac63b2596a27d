"""The report: JSON schema 1, what it says of the machine, and the comparison of two reports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

SCHEMA = 1
_PACKAGES = ("megatron-core", "triton", "torch_npu", "numpy", "liger-kernel", "deepspeed", "transformer-engine")

_TOP = {"schema": int, "machine": dict, "versions": dict, "commit": str, "ceilings": dict, "load": list, "cases": list}
_NUMBER = (int, float, type(None))
_CASE = {
    "id": str, "feature": str, "group": str, "metric": str, "against": (str, type(None)), "better": str, "unit": str,
    "clock": str, "workload": dict, "ours": _NUMBER, "floor": _NUMBER, "fraction": _NUMBER, "value": _NUMBER, "peers": dict,
    "rounds": int, "spread": _NUMBER, "must": _NUMBER, "aim": _NUMBER, "verdict": str, "reason": str,
    "check": (dict, type(None)),
}  # fmt: skip
_PEER = {"value": _NUMBER, "ratio": _NUMBER, "p20": _NUMBER, "p80": _NUMBER, "status": str, "version": str}


class SchemaError(ValueError):
    """A file is no report of this schema; the text names the place."""


def validate(report: Any) -> None:
    """Check names and types of a report.

    Raises:
        SchemaError: naming the first place that does not fit.
    """
    _fits(report, _TOP, "report")
    if report["schema"] != SCHEMA:
        raise SchemaError(f"report.schema is {report['schema']}, this version reads {SCHEMA}")
    for index, case in enumerate(report["cases"]):
        _fits(case, _CASE, f"report.cases[{index}]")
        for name, peer in case["peers"].items():
            _fits(peer, _PEER, f"report.cases[{index}].peers[{name!r}]")


def _fits(found: Any, wanted: dict[str, Any], place: str) -> None:
    if not isinstance(found, dict):
        raise SchemaError(f"{place} is {type(found).__name__}, not an object")
    for name in wanted.keys() - found.keys():
        raise SchemaError(f"{place} lacks {name!r}")
    for name in found.keys() - wanted.keys():
        raise SchemaError(f"{place} has an unknown entry {name!r}")
    for name, kinds in wanted.items():
        if not isinstance(found[name], kinds) or isinstance(found[name], bool):
            raise SchemaError(f"{place}.{name} is {found[name]!r}")


def make_report(device: str, ceilings: dict[str, Any], load: list[float], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that belongs to the figures of one run."""
    return {
        "schema": SCHEMA,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "ceilings": ceilings,
        "load": load,
        "cases": cases,
    }


def machine(device: str) -> dict[str, Any]:
    """Processor, memory and accelerator."""
    found = {"cpu": _processor_name(), "cores": os.cpu_count(), "isa": torch.backends.cpu.get_cpu_capability()}
    found |= {"ram_GiB": round(psutil.virtual_memory().total / 2**30, 1), "threads": 1, "device": device, "driver": ""}
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "driver": torch.version.cuda or ""}
    return found


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, torch and whatever peers are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the source tree, with `+` when files differ from it; empty outside of a checkout."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.returncode else "")


def read_report(path: str | Path) -> dict[str, Any]:
    """Read and validate a report file; raises SchemaError naming the file."""
    try:
        report = json.loads(Path(path).read_text())
        validate(report)
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path}: {error}") from error
    return report


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every case of both reports that has figures: id, before, now, spread and verdict.

    Worse is a counted figure that grew, or a metric that changed for the worse by more than 10 % and twice the spread.
    """
    earlier = {case["id"]: case for case in before["cases"]}
    rows = []
    for case in now["cases"]:
        old = earlier.get(case["id"])
        if old is None or old["value"] is None or case["value"] is None:
            continue
        rows.append({"id": case["id"], "before": old["value"], "now": case["value"], "verdict": _change(old["value"], case)})
    return rows


def _change(before: float, case: dict[str, Any]) -> str:
    now = case["value"]
    worse = now < before if case["better"] == "higher" else now > before
    if case["clock"] == "count":
        if now == before:
            return "same"
        return "worse" if worse or case["better"] == "equal" else "better"
    allowed = max(0.10, 2 * (case["spread"] or 0.0))
    if before and abs(now - before) / abs(before) <= allowed:
        return "same"
    return "worse" if worse else "better"
