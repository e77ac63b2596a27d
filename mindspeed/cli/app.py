"""Command line: doctor, features, explain, preprocess, pretrain, quickstart.

Commands that train or read training flags pass everything behind their name to the training parser, so
`mindspeed pretrain --help` shows the same flags, and the same sentences, as a script with our import line.
"""

from __future__ import annotations

import sys

import typer

from mindspeed import __version__
from mindspeed.errors import MindspeedError

app = typer.Typer(
    name="mindspeed",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_ALL_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mindspeed {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version of mindspeed and exit."
    ),
) -> None:
    """Acceleration for Megatron training on Ascend NPU, NVIDIA GPU and CPU."""


@app.command()
def doctor() -> None:
    """Show what is installed, which device is used and what is missing."""
    from mindspeed.cli.doctor import run

    raise typer.Exit(run())


@app.command()
def features(
    name: str = typer.Argument("", help="Show one feature in full."),
    markdown: bool = typer.Option(False, "--markdown", help="Print the table that the docs contain."),
) -> None:
    """List every feature: flag, level, what it needs and what it cannot be combined with."""
    from mindspeed.cli.features import run

    raise typer.Exit(run(name, markdown))


@app.command(context_settings=_ALL_ARGUMENTS)
def explain(
    context: typer.Context,
    repairs: bool = typer.Option(False, "--repairs", help="List platform and host repairs as well."),
) -> None:
    """Say what a training command line switches on, what gets patched and why, and what is refused.

    Write the training flags behind two dashes: mindspeed explain -- --num-layers 8 --noop-layers 0,7
    """
    from mindspeed.cli.explain import run

    raise typer.Exit(run(context.args, repairs))


@app.command(context_settings={**_ALL_ARGUMENTS, "help_option_names": []})
def pretrain(context: typer.Context) -> None:
    """Pretrain a GPT with the built-in trainer; `--nproc 2` starts the processes itself."""
    from mindspeed.cli.pretrain import run

    raise typer.Exit(run(context.args))


@app.command(context_settings={**_ALL_ARGUMENTS, "help_option_names": []})
def preprocess(context: typer.Context) -> None:
    """Turn text, JSONL or Parquet into the .bin/.idx files that training reads."""
    from mindspeed.cli.preprocess import run

    raise typer.Exit(run(context.args))


@app.command(context_settings={**_ALL_ARGUMENTS, "help_option_names": []})
def quickstart(context: typer.Context) -> None:
    """Pretrain a small GPT on text that every machine has, and show the result."""
    from mindspeed.cli.quickstart import run

    raise typer.Exit(run(context.args))


def main() -> None:
    """Entry point of the `mindspeed` command: our own errors end in a message, everything else in a traceback."""
    try:
        app()
    except MindspeedError as error:
        from mindspeed.cli.messages import show_error

        show_error(error)
        sys.exit(2)
