"""The command `python -m benchmarks [GROUP ...]`; exit codes: 0 fine, 1 a must missed, 2 could not run, 3 wrong result."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._case import PRESETS, Case, Run, cases_of, groups
from benchmarks._ceilings import measure_ceilings
from benchmarks._report import SchemaError, compare, make_report, read_report, validate
from benchmarks._runner import entry_without_figures, run_by_id
from benchmarks._table import plot_group, show_comparison, show_list, show_results
from mindspeed.testing.pool import RankFailure, pools

_ROUNDS = {"smoke": 3, "standard": 5, "full": 7}


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, compare and guard this library.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"all, or some of: {', '.join(groups())}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="auto", help="where to run")
    parser.add_argument("--preset", choices=PRESETS, default="standard", help="how much to run")
    parser.add_argument("--only", metavar="GLOB", help="cases whose id matches, ops.rms_norm.* for instance")
    parser.add_argument("--peers", metavar="LIST", help="comma-separated names of peers, or none; default: all installed")
    parser.add_argument("--rounds", type=_positive, help="measured rounds; default by preset: 3, 5, 7")
    parser.add_argument("--ranks", type=_sizes, default=(1, 2), help="world sizes for cases of several processes; default: 1,2")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--against", metavar="FILE|REF", help="compare with a report, or with a git revision measured now")
    parser.add_argument("--check", action="store_true", help="exit 1 when a must is missed, 2 when a case could not run")
    parser.add_argument("--list", action="store_true", help="show the cases and run nothing")
    parser.add_argument("--plots", metavar="DIR", help="write one picture for each group")
    parser.add_argument("--seconds", type=float, help="begin no case after that many seconds; those that are left are skipped")
    parser.add_argument("--timeout-per-case", type=float, default=300.0, metavar="S", help="seconds before a case is killed")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number; give 1 or more")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(size) for size in text.split(","))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file or pipe has no width of its own
    known = groups()
    chosen = list(known) if not options.groups or "all" in options.groups else options.groups
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown group {', '.join(unknown)}; there are {', '.join(known)}")
    run = _run_options(options)
    modules = {name: known[name] for name in chosen}
    cases = [case for case in cases_of(m for names in modules.values() for m in names) if _selected(case, options)]
    if options.list:
        show_list(console, cases, run)
        return 0
    if not cases:
        parser.error("no case matches; see --list")
    try:
        report = _run_all(console, cases, modules, run, options)
    finally:
        pools().close()
    return exit_code(report["cases"], check=options.check) or _against(console, report, options)


def _run_options(options: argparse.Namespace) -> Run:
    peers = None if options.peers is None else tuple(name for name in options.peers.split(",") if name not in ("", "none"))
    return Run(
        device=_device(options.device),
        preset=options.preset,
        rounds=options.rounds or _ROUNDS[options.preset],
        peers=peers,
        ranks=options.ranks,
        timeout=options.timeout_per_case,
    )


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    from mindspeed.platform import current

    return current().name


def _selected(case: Case, options: argparse.Namespace) -> bool:
    if options.only and not fnmatch.fnmatch(case.id, options.only):
        return False
    return bool(options.only) or PRESETS.index(case.preset) <= PRESETS.index(options.preset)


def _run_all(
    console: Console, cases: list[Case], modules: dict[str, list[str]], run: Run, options: argparse.Namespace
) -> dict[str, Any]:
    load, begin = [os.getloadavg()[0]], time.monotonic()
    report = make_report(run.device, _ceilings(run), load, [])
    entries = report["cases"]
    for group in dict.fromkeys(case.group for case in cases):
        found = []
        for case in (case for case in cases if case.group == group):
            if options.seconds is not None and time.monotonic() - begin > options.seconds:
                found.append(entry_without_figures(case, "skipped", f"after {options.seconds:g} s no case is begun"))
            else:
                with console.status(f"{case.id} ..."):
                    found.append(run_apart(case, [case.function.__module__], run))
            _save({**report, "cases": entries + found}, options.json)  # a run that is stopped keeps what it has
        show_results(console, group, found)
        if options.plots and (path := plot_group(Path(options.plots), group, found)):
            console.print(f"plot: {path}")
        entries += found
    load.append(os.getloadavg()[0])
    validate(report)
    _save(report, options.json)
    return report


def _ceilings(run: Run) -> dict[str, Any]:
    """What the machine reaches at best; a device on which not even that runs is still asked for all cases."""
    try:
        return measure_ceilings(run.device)
    except RankFailure as failure:
        print(failure, file=sys.stderr)
        return {}


def _save(report: dict[str, Any], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def run_apart(case: Case, modules: list[str], run: Run) -> dict[str, Any]:
    """Run a case in a process of its own, which is killed with its stack shown when it takes too long."""
    try:
        (entry,) = pools().get(1).run(run_by_id, modules, case.id, run, timeout=run.timeout)
        if run.device == "cuda" and entry["verdict"] in ("failed", "WRONG"):
            pools().get(1).kill()  # after an error of the device all calls of its process fail: the next case gets another
        return entry
    except RankFailure as failure:
        print(failure, file=sys.stderr)
        verdict = "hung" if "did not finish within" in str(failure) else "failed"
        return entry_without_figures(case, verdict, str(failure).splitlines()[0])


def exit_code(entries: list[dict[str, Any]], *, check: bool) -> int:
    """3 for any wrong result; with `check` 2 for a case that could not run, 1 for a missed must; else 0."""
    verdicts = {entry["verdict"] for entry in entries}
    if "WRONG" in verdicts:
        return 3
    if check and verdicts & {"failed", "hung"}:
        return 2
    return 1 if check and "missed" in verdicts else 0


def _against(console: Console, report: dict[str, Any], options: argparse.Namespace) -> int:
    if not options.against:
        return 0
    try:
        before = read_report(options.against) if Path(options.against).is_file() else _report_of(options)
    except (SchemaError, subprocess.CalledProcessError) as error:
        console.print(f"--against {options.against}: {error}")
        return 2
    rows = compare(before, report)
    show_comparison(console, rows)
    return int(any(row["verdict"] == "worse" for row in rows))


def _report_of(options: argparse.Namespace) -> dict[str, Any]:
    """Run the same cases on another revision of this repository, checked out beside it for the time being."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as directory:
        tree, report = Path(directory, "tree"), Path(directory, "report.json")
        git = ["git", "-C", str(root), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), options.against], check=True)
        try:
            command = [sys.executable, "-m", "benchmarks", *options.groups, "--json", str(report)]
            for name in ("device", "preset", "only", "peers", "rounds", "ranks"):
                if (value := getattr(options, name)) is not None:
                    command += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
            subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
            return read_report(report)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


if __name__ == "__main__":
    sys.exit(main())
