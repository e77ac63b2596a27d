"""Runs one case: check first, then paired rounds, then the verdict."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks._case import Case, Check, Counted, Paired, Run, Skip, Timing, cases_of
from benchmarks._measure import NOISY_SPREAD, FloorClock, Summary, calls_needed, seconds_per_call, summarise

VERDICTS = ("aim", "ok", "missed", "noisy", "info", "WRONG", "skipped", "failed", "hung")


@dataclass
class Figures:
    """Costs of the contenders, one entry a round (seconds for timed cases)."""

    ours: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)  # of peers without figures
    versions: dict[str, str] = field(default_factory=dict)
    check: Check | None = None
    workload: Mapping[str, Any] = field(default_factory=dict)
    statistic: str = "median"


class WrongResultError(Exception):
    """Our own result failed its check; nothing is reported."""

    def __init__(self, check: Check, workload: Mapping[str, Any]) -> None:
        self.check = check
        self.workload = workload
        super().__init__(f"error {check.error:.2e} exceeds {check.tolerance:.2e} {check.detail}".strip())


def run_case(case: Case, run: Run) -> dict[str, Any]:
    """Run one case in this process and return its entry of the report."""
    load_before = os.getloadavg()[0]
    try:
        figures = _figures(case, run)
    except Skip as reason:
        return entry_without_figures(case, "skipped", str(reason))
    except WrongResultError as error:
        return entry_without_figures(case, "WRONG", str(error)) | {
            "check": {"error": error.check.error, "tolerance": error.check.tolerance},
            "workload": dict(error.workload),
        }
    except Exception as error:
        traceback.print_exc()
        return entry_without_figures(case, "failed", _one_line(error))
    busy = case.clock == "wall" and max(load_before, os.getloadavg()[0]) > (os.cpu_count() or 1) / 2
    return report_entry(case, figures, busy=busy)


def _one_line(error: Exception) -> str:
    """Kind of error, and first and last line of its text (a subprocess' traceback ends with what matters)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {text}"[:400]


def run_by_id(world: Any, modules: list[str], case_id: str, run: Run) -> dict[str, Any]:
    """Body for a pool worker: find the case and run it there."""
    (case,) = (case for case in cases_of(modules) if case.id == case_id)
    torch.use_deterministic_algorithms(False)
    return run_case(case, run)


def _figures(case: Case, run: Run) -> Figures:
    if run.device not in case.devices:
        raise Skip(f"runs on {', '.join(case.devices)} only")
    work = case.function(run)
    if isinstance(work, Counted):
        return _counted(work, run)
    if isinstance(work, Paired):
        return _paired(work, run)
    return _timed(work, case, run)


def _require(check: Check, workload: Mapping[str, Any]) -> Check:
    if not check.ok:
        raise WrongResultError(check, workload)
    return check


def _counted(work: Counted, run: Run) -> Figures:
    peers = {name: [value] for name, value in work.peers.items() if run.wants_peer(name)}
    floor = [] if work.floor is None else [work.floor]
    check = _require(work.check, work.workload)
    return Figures([work.ours], floor, peers, check=check, workload=work.workload)


def _paired(work: Paired, run: Run) -> Figures:
    figures = Figures(check=_require(work.check, work.workload), workload=work.workload, statistic=work.statistic)
    figures.versions, figures.status = dict(work.versions), dict(work.status)
    work.round()  # warm-up
    for _ in range(run.rounds):
        costs = dict(work.round())
        figures.ours.append(costs.pop("ours"))
        if "floor" in costs:
            figures.floor.append(costs.pop("floor"))
        for name, cost in costs.items():
            figures.peers.setdefault(name, []).append(cost)
    return figures


def _timed(work: Timing, case: Case, run: Run) -> Figures:
    figures = Figures(check=_require(_poisoned(work.check, work.ours), work.workload), workload=work.workload)
    contenders = {"ours": work.ours, **_usable_peers(work, case, run, figures)}
    floor = FloorClock(work.floor, run.device, case.clock) if work.floor else None
    inputs = work.inputs()
    calls = {}
    for name, contender in contenders.items():
        seconds_per_call(contender, inputs, case.clock, 1)  # first call: compilation, caches, lazy imports
        calls[name] = calls_needed(seconds_per_call(contender, inputs, case.clock, 1))
    for number in range(run.rounds + 1):
        inputs = work.inputs()
        gc.collect()
        names = list(contenders) if number % 2 else list(reversed(contenders))  # alternate who goes first
        costs = {name: seconds_per_call(contenders[name], inputs, case.clock, calls[name]) for name in names}
        floor_seconds = floor.seconds() if floor else None
        if number == 0:
            continue  # warm-up
        figures.ours.append(costs.pop("ours"))
        if floor_seconds is not None:
            figures.floor.append(floor_seconds)
        for name, cost in costs.items():
            figures.peers.setdefault(name, []).append(cost)
    return figures


def _poisoned(check: Callable[[Any], Check], contender: Any) -> Check:
    """Check with uninitialised memory full of NaN, so that an element that was never written is found."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return check(contender)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def _usable_peers(work: Timing, case: Case, run: Run, figures: Figures) -> dict[str, Any]:
    """Peers that are wanted, installed and right; the others' status goes into `figures`."""
    usable = {}
    for name, peer in work.peers.items():
        if not run.wants_peer(name) and name != case.against:  # a ratio cannot do without its peer
            continue
        figures.versions[name] = peer.version
        try:
            contender = peer.make()
            check = _poisoned(work.check, contender)
        except ImportError:
            figures.status[name] = "not installed"
        except Exception as error:
            figures.status[name] = f"peer failed: {type(error).__name__}: {error}"[:200]
        else:
            if check.ok:
                usable[name] = contender
            else:
                figures.status[name] = "peer wrong"
    return usable


def report_entry(case: Case, figures: Figures, *, busy: bool = False) -> dict[str, Any]:
    """Turn figures into the case's entry of the report (schema 1)."""
    scale = _unit_scale(case)
    middle = _STATISTICS[figures.statistic]
    ours = middle(figures.ours)
    measured = _metric(case, figures)
    check = figures.check
    verdict = "info" if measured is None else judge(case, measured, statistic=figures.statistic, busy=busy)
    return _head(case) | {
        "workload": dict(figures.workload),
        "ours": ours * scale,
        "floor": middle(figures.floor) * scale if figures.floor else None,
        "fraction": _ratio(figures.floor, figures.ours, figures.statistic).median if figures.floor and ours else None,
        "value": measured.median * (scale if case.metric == "value" else 1.0) if measured else None,
        "peers": _peer_entries(figures, scale),
        "rounds": len(figures.ours),
        "spread": measured.spread if measured else summarise(figures.ours).spread,
        "verdict": verdict,
        "reason": "the machine was busy" if busy and verdict == "noisy" else "",
        "check": None if check is None else {"error": check.error, "tolerance": check.tolerance},
    }


def _unit_scale(case: Case) -> float:
    """Seconds in the case's unit; counts are reported as they are."""
    return 1.0 if case.clock == "count" else {"ms": 1e3, "us": 1e6}.get(case.unit.rpartition(" ")[2], 1.0)


def _median(values: list[float]) -> float:
    return summarise(values).median


_STATISTICS: dict[str, Callable[[list[float]], float]] = {"median": _median, "min": min, "last": lambda values: values[-1]}


def _metric(case: Case, figures: Figures) -> Summary | None:
    """The guarded figure in base units; None if its peer or floor is missing."""
    if case.metric == "value":
        summary = summarise(figures.ours)
        return Summary(_STATISTICS[figures.statistic](figures.ours), summary.p20, summary.p80)
    rivals = figures.floor if case.metric == "fraction" else figures.peers.get(case.against or "", [])
    return _ratio(rivals, figures.ours, figures.statistic) if rivals else None


def _ratio(rivals: list[float], ours: list[float], statistic: str) -> Summary:
    """Per-round rival / ours, so that slow drifts of the machine cancel."""
    ratios = summarise([rival / own if own else float("inf") for rival, own in zip(rivals, ours, strict=True)])
    if statistic == "median":
        return ratios
    middle = _STATISTICS[statistic]
    return Summary(middle(rivals) / middle(ours), ratios.p20, ratios.p80)


def _peer_entries(figures: Figures, scale: float) -> dict[str, dict[str, Any]]:
    middle = _STATISTICS[figures.statistic]
    entries: dict[str, dict[str, Any]] = {}
    for name, costs in figures.peers.items():
        ratio = _ratio(costs, figures.ours, figures.statistic)
        value = middle(costs) * scale
        entries[name] = {"value": value, "ratio": ratio.median, "p20": ratio.p20, "p80": ratio.p80, "status": "ok"}
    for name, status in figures.status.items():
        entries[name] = {"value": None, "ratio": None, "p20": None, "p80": None, "status": status}
    for name, found in entries.items():
        found["version"] = figures.versions.get(name, "")
    return entries


def judge(case: Case, measured: Summary, *, statistic: str = "median", busy: bool = False) -> str:
    """Verdict on a metric: "aim", "ok", "missed", "noisy", or "info" where nothing is demanded."""
    if case.must is None:
        return "info"
    too_wide = statistic == "median" and measured.spread > NOISY_SPREAD
    if case.clock != "count" and (busy or too_wide):
        return "noisy"
    value = measured.median * (_unit_scale(case) if case.metric == "value" else 1.0)
    if case.aim is not None and _meets(value, case.aim, case.better):
        return "aim"
    return "ok" if _meets(value, case.must, case.better) else "missed"


def _meets(value: float, bound: float, better: str) -> bool:
    return {"higher": value >= bound, "lower": value <= bound, "equal": value == bound}[better]


def _head(case: Case) -> dict[str, Any]:
    names = ("id", "feature", "group", "metric", "against", "better", "unit", "clock", "must", "aim")
    return {name: getattr(case, name) for name in names}


def entry_without_figures(case: Case, verdict: str, reason: str) -> dict[str, Any]:
    """Entry of a case that was skipped, failed, hung or computed something wrong."""
    nothing = dict.fromkeys(("ours", "floor", "fraction", "value", "spread", "check"))
    return _head(case) | nothing | {"workload": {}, "peers": {}, "rounds": 0, "verdict": verdict, "reason": reason}
