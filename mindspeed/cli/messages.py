"""How errors look on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mindspeed.errors import ConfigError, MindspeedError


def show_error(error: MindspeedError, console: Console | None = None) -> None:
    """Print an error for a person: all problems in one table when it lists several."""
    console = console or Console(stderr=True)
    if isinstance(error, ConfigError):
        show_problems(error, console)
        return
    console.print(Panel(Text(str(error)), title=_title(error), title_align="left", border_style="red"))


def show_problems(error: ConfigError, console: Console) -> None:
    """One row a problem: what was given, the rule, what to do."""
    table = Table(title=str(error).partition(":")[0], title_justify="left", show_lines=True)
    for heading in ("given", "rule", "what to do"):
        table.add_column(heading, overflow="fold")
    for problem in error.problems:
        value = "" if problem.value is None or problem.value is True else f" {problem.value}"
        table.add_row(Text(f"{problem.flag}{value}", style="bold"), Text(problem.rule), Text(problem.fix))
    console.print(table)


def file_trouble(error: OSError) -> str:
    """What the operating system refused, for which path, and what to look at."""
    path = f"{error.filename}: " if error.filename else ""
    return f"{path}{error.strerror or error}. Check the path, its permissions and the space left."


def _title(error: MindspeedError) -> str:
    """`CheckpointError` -> `checkpoint error`."""
    return type(error).__name__.removesuffix("Error").lower() + " error"
