"""Runs cases of Megatron-LM and judges them; `python -m tests.hosts.matrix [group or part of a name ...]` prints a table."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.cases import GROUPS, Case, all_cases
from tests.hosts.launcher import MegatronRuns, Run, tiny_gpt, write_corpus

Curve = dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Outcome:
    """What a case gave: its curve, whether that is right, and why not."""

    case: Case
    curve: Curve
    seconds: float
    complaint: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the case passed."""
        return not self.complaint


class Matrix:
    """Runs each case at most once; references of other cases are run when they are needed."""

    def __init__(self, runs: MegatronRuns, directory: Path) -> None:
        self._runs = runs
        self._directory = directory
        self.corpus = write_corpus(directory)
        self._cases = all_cases()
        self._outcomes: dict[str, Outcome] = {}
        self._seed: Path | None = None

    def outcome(self, name: str) -> Outcome:
        """The outcome of a case by name."""
        if name not in self._outcomes:
            self._outcomes[name] = self._judge(self._cases[name])
        return self._outcomes[name]

    def seed(self) -> Path:
        """Directory of the one checkpoint that all layouts start from."""
        if self._seed is None:
            directory = self._directory / "seed"
            run = self._runs(*tiny_gpt(self.corpus, iterations=1, lr=0.0, save=directory, save_interval=1))
            if not run.ok:
                raise RuntimeError(run.tail())
            self._seed = directory
        return self._seed

    def _run(self, case: Case, world: int, flags: dict) -> Run:
        start = {"load": self.seed(), "finetune": True, "no_load_optim": True, "no_load_rng": True} if case.seeded else {}
        return self._runs(*tiny_gpt(self.corpus, **{**start, **flags}), world=world)

    def _judge(self, case: Case) -> Outcome:
        runs = self._resumed(case) if case.resume else [self._run(case, case.world, dict(case.flags))]
        curve: Curve = {}
        for run in runs:
            if not run.ok:
                return Outcome(case, curve, run.seconds, f"ranks ended with {run.codes}", run.tail())
            curve.update(run.curve)
        seconds = sum(run.seconds for run in runs)
        complaint = self._compare(case, curve) if case.like else unhealthy(curve, case.flags)
        return Outcome(case, curve, seconds, complaint, runs[-1].tail(1500) if complaint else "")

    def _resumed(self, case: Case) -> list[Run]:
        directory = self._directory / "resumed"
        shutil.rmtree(directory, ignore_errors=True)
        kind = {"ckpt_format": "torch"} if case.resume == "torch" else {"ckpt_format": "torch_dist"}
        if case.resume == "async":
            kind["async_save"] = True
        first = {**case.flags, **kind, "save": directory, "save_interval": 3, "exit_interval": 3}
        world, flags = case.then or (case.world, case.flags)
        second = {**flags, **kind, "load": directory}
        runs = [self._run(case, case.world, first)]
        if runs[0].ok:
            runs.append(
                self._run(case, world, {**second, "save": directory, "save_interval": 100} if "async_save" in kind else second)
            )
        return runs

    def _compare(self, case: Case, curve: Curve) -> str:
        reference = self.outcome(case.like).curve
        if curve.keys() != reference.keys() or not curve:
            return f"has steps {sorted(curve)}, {case.like} has {sorted(reference)}"
        for step, (loss, norm) in curve.items():
            if case.tolerance == 0 and (loss, norm) != reference[step]:
                return f"step {step}: {loss} / {norm} is not {' / '.join(reference[step])}"
            if not math.isclose(float(loss), float(reference[step][0]), rel_tol=case.tolerance):
                return f"step {step}: loss {loss} is not {reference[step][0]} (relative tolerance {case.tolerance:g})"
            if not math.isclose(
                float(norm), float(reference[step][1]), rel_tol=max(case.tolerance * 10, 1e-9), abs_tol=1.01e-3
            ):
                return f"step {step}: gradient norm {norm} is not {reference[step][1]}"
        return ""


def unhealthy(curve: Curve, flags: object) -> str:
    """Why a curve that is compared with nothing is wrong."""
    if len(curve) < 3:
        return f"only steps {sorted(curve)} printed a loss"
    values = [float(loss) for loss, _ in curve.values()]
    if not all(math.isfinite(value) and 8.5 < value < 9.5 for value in values):
        return f"losses {values} are not those of a model that starts from random weights"
    return ""


def main(wanted: list[str]) -> int:
    """Run all cases, or those of the named groups or with the given text in their name; returns the exit status."""
    from rich.console import Console
    from rich.table import Table

    checkout = os.environ.get("MEGATRON_LM_PATH")
    if not checkout:
        print("set MEGATRON_LM_PATH to a Megatron-LM checkout of core_v0.12.1", file=sys.stderr)
        return 2
    names = [case.name for group in GROUPS if not wanted or group in wanted for case in GROUPS[group]()]
    if wanted and not names:
        names = [name for name in all_cases() if any(part in name for part in wanted)]
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("case", "ranks", "losses", "last gradient norm", "must equal", "seconds", "verdict")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch, MegatronRuns(Path(checkout), Path(scratch)) as runs:
        matrix = Matrix(runs, Path(scratch))
        for name in dict.fromkeys(names):
            outcome = matrix.outcome(name)
            failed += not outcome.ok
            steps = sorted(outcome.curve)
            losses = " ".join(outcome.curve[step][0].replace("E+00", "") for step in steps)
            norm = outcome.curve[steps[-1]][1] if steps else ""
            verdict = (
                "[green]equal"
                if outcome.ok and outcome.case.like
                else "[green]ok"
                if outcome.ok
                else f"[red]{outcome.complaint}"
            )
            table.add_row(name, str(outcome.case.world), losses, norm, outcome.case.like, f"{outcome.seconds:.1f}", verdict)
            if not outcome.ok:
                console.print(f"[red]{name}: {outcome.complaint}[/]\n{outcome.detail}", markup=True)
    console.print(table)
    console.print(f"{len(table.rows) - failed} of {len(table.rows)} cases passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
