"""`mindspeed features`: every feature with its flags, level, needs and conflicts."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindspeed.errors import ConfigError, Problem
from mindspeed.patching.discovery import all_features
from mindspeed.patching.feature import Feature

LEVELS = {0: "always", 1: "level 1", 2: "by flag"}


def run(name: str = "", markdown: bool = False, console: Console | None = None) -> int:
    """Print all features, or one in full."""
    console = console or Console()
    features = all_features()
    if name:
        show_one(find(name, features), console)
    elif markdown:
        print(markdown_table(features))
    else:
        show_all(features, console)
    return 0


def find(name: str, features: Iterable[Feature]) -> Feature:
    """The feature of that name or with that flag."""
    wanted = name.removeprefix("--")
    for feature in features:
        if wanted == feature.name or any(wanted == spec.option.removeprefix("--") for spec in feature.specs):
            return feature
    known = ", ".join(sorted(feature.name for feature in features))
    raise ConfigError([Problem("mindspeed features", name, "no feature has this name or flag", f"choose one of {known}")])


def flags_text(feature: Feature) -> str:
    """Option strings of a feature, one a line."""
    return "\n".join(spec.option for spec in feature.specs) or "host flags"


def show_all(features: Iterable[Feature], console: Console) -> None:
    """One row a feature."""
    table = Table(title="Features", title_justify="left", show_lines=True)
    for heading in ("feature", "what it does", "flags", "on", "needs", "not with"):
        table.add_column(heading, overflow="fold")
    for feature in features:
        table.add_row(
            Text(feature.name, style="bold"),
            feature.summary,
            flags_text(feature),
            LEVELS[feature.level],
            "\n".join(feature.needs),
            "\n".join(feature.conflicts),
        )
    console.print(table)
    console.print("One in full: mindspeed features NAME. What a command line switches on: mindspeed explain -- FLAGS")


def show_one(feature: Feature, console: Console) -> None:
    """Flags with defaults and help, then the rest."""
    console.print(Text(f"{feature.name}: {feature.summary}", style="bold"))
    table = Table()
    for heading in ("flag", "default", "choices", "meaning"):
        table.add_column(heading, overflow="fold")
    for spec in feature.specs:
        table.add_row(spec.option, str(spec.default), ", ".join(map(str, spec.choices or ())), Text(spec.help))
    console.print(table)
    console.print(f"On: {LEVELS[feature.level]}. Needs: {', '.join(feature.needs) or 'nothing'}.")
    for other, reason in feature.conflicts.items():
        console.print(f"Not with {other}: {reason}")


def markdown_table(features: Iterable[Feature]) -> str:
    """The table of the docs and the README, generated so that it cannot go out of date."""
    lines = ["| feature | flags | on | what it does |", "|---|---|---|---|"]
    for feature in features:
        flags = ", ".join(f"`{spec.option}`" for spec in feature.specs) or "host flags"
        lines.append(
            f"| [{feature.name}](features/{feature.name}.md) | {flags} | {LEVELS[feature.level]} | {feature.summary} |"
        )
    return "\n".join(lines)
