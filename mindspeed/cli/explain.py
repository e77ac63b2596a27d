"""`mindspeed explain -- FLAGS`: what a training command line switches on, what is patched and why, what is refused."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindspeed.cli.messages import show_problems
from mindspeed.errors import ConfigError, MindspeedError, Problem
from mindspeed.host.megatron_defaults import HostDefaults
from mindspeed.host.trainer import TrainerHost
from mindspeed.patching import activation
from mindspeed.patching.activation import Active
from mindspeed.patching.conflicts import is_layer
from mindspeed.patching.discovery import all_features
from mindspeed.patching.idle import IdleFlag, idle_flags
from mindspeed.patching.overview import operator_rows, operator_table
from mindspeed.patching.plan import Plan
from mindspeed.runtime import Runtime, revert, start

_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def run(argv: list[str], repairs: bool = False, console: Console | None = None) -> int:
    """Explain a command line; 0 when it would start, 2 when something is refused. Trains nothing, leaves nothing behind."""
    console = console or Console()
    try:
        args, foreign = parse([word for word in argv if word != "--"])
    except ConfigError as error:
        show_problems(error, console)
        return 2
    runtime = start(TrainerHost(args), (HostDefaults(), *all_features()))
    try:
        return _explain(runtime, args, foreign, repairs, console)
    finally:
        revert(force=True)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments of a command line, and flags of it that only Megatron-LM has (they are set aside).

    The world is as large as the parallel sizes ask for, unless WORLD_SIZE says otherwise.

    Raises:
        ConfigError: flags that nobody knows, or unreadable values.
    """
    from mindspeed.training.arguments import host_only_flags, parse_args

    foreign = [word.split("=", 1)[0] for word in words if word.split("=", 1)[0] in host_only_flags()]
    args = parse_args(argv=_without(words, foreign))
    if "WORLD_SIZE" not in os.environ:
        for dest in _SIZES:
            args.world_size *= getattr(args, dest, None) or 1
    return args, foreign


def _without(words: list[str], flags: Iterable[str]) -> list[str]:
    """Drop flags together with their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.split("=", 1)[0] in flags
        if not dropping:
            kept.append(word)
    return kept


def _explain(runtime: Runtime, args: argparse.Namespace, foreign: list[str], repairs: bool, console: Console) -> int:
    problems: list[Problem] = []
    active: list[Active] = []
    plan: Plan | None = None
    try:
        settled = runtime.settle(args, args.given_flags)
        problems += _host_problems(args, settled)
        active = runtime.check(args, args.given_flags)
    except ConfigError as error:
        problems += error.problems
        active = [one for one in _survey(runtime, args) if not _concerned(one, error.problems)]
    try:
        plan = activation.plan_for(active, runtime.host, runtime.ledger)
    except MindspeedError as error:
        problems.append(Problem("patches", None, str(error), "see the message"))
    asked, refused = _survey(runtime, args), {problem.flag for problem in problems}
    idle = [flag for flag in idle_flags(runtime.features, asked, args) if flag.option.split(" ")[0] not in refused]
    console.print(feature_table(active, plan, problems, idle if asked else ()))
    if served := operator_rows(active):
        console.print(operator_table(served))
    for line in getattr(getattr(args, "mindspeed", None), "derived", ()):
        console.print(f"derived: {line}", markup=False)
    if foreign:
        console.print(f"flags of Megatron-LM alone, not examined: {' '.join(foreign)}", markup=False)
    _show_ground(runtime, repairs, console)
    if problems:
        show_problems(ConfigError(dict.fromkeys(problems)), console)
    return 2 if problems else 0


def _survey(runtime: Runtime, args: argparse.Namespace) -> list[Active]:
    """Features that the flags ask for, as far as their flags can be read."""
    try:
        return activation.choose(runtime.features, args, platform=runtime.platform.name, given=args.given_flags)
    except ConfigError:
        return []


def _concerned(one: Active, problems: Iterable[Problem]) -> bool:
    """Whether a problem is about this feature."""
    own = {spec.option for spec in one.feature.specs} | {one.why.split(" ")[0], one.name}
    return any(problem.flag.split(" ")[0] in own for problem in problems)


def _host_problems(args: argparse.Namespace, active: list[Active]) -> list[Problem]:
    """What the trainer itself would refuse; only when the command line is complete enough to tell."""
    from mindspeed.training import derive, validation

    if not validation.is_complete(args):
        return []
    with activation.overridden(args, active):
        wrong = validation.out_of_range(args)
        derive.derive(args)
        return validation.problems(args, wrong)


def feature_table(
    active: Iterable[Active], plan: Plan | None, problems: Iterable[Problem], idle: Iterable[IdleFlag] = ()
) -> Table:
    """One row a feature that is on, one a refusal, one a flag that changes nothing."""
    table = Table(title="What these flags do", title_justify="left", show_lines=True)
    for heading in ("feature", "state", "because", "changes"):
        table.add_column(heading, overflow="fold")
    for one in active:
        changes = [
            f"{step.patch.operation.value} {step.patch.target}" + (f"\n  {step.patch.reason}" if step.patch.reason else "")
            for step in (plan.steps if plan else ())
            if step.patch.owner == one.name
        ]
        table.add_row(
            Text(one.name, style="bold"), Text("on", style="green"), one.why, Text("\n".join(changes) or "nothing patched")
        )
    for problem in problems:
        table.add_row(Text(problem.flag, style="bold"), Text("refused", style="red"), Text(problem.rule), "")
    for flag in idle:
        table.add_row(Text(flag.option, style="bold"), Text("no effect", style="yellow"), Text(flag.because), "")
    return table


def _show_ground(runtime: Runtime, repairs: bool, console: Console) -> None:
    """Platform shims and host repairs: counted, or listed when asked for."""
    rows = [row for row in runtime.ledger.rows if is_layer(row.owner)]
    if not repairs:
        owners = sorted({row.owner for row in rows})
        text = f"always: {len(rows)} changes by {', '.join(owners)}; list them with mindspeed explain --repairs -- FLAGS"
        console.print(text, markup=False)
        return
    table = Table(title="Always: platform and repairs", title_justify="left")
    for heading in ("owner", "change", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.owner, Text(f"{row.operation} {row.target}"), Text(row.reason))
    console.print(table)
