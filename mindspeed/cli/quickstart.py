"""`mindspeed quickstart`: pretrain a small GPT on text that every machine has, in a few minutes, without a network."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from mindspeed.cli.messages import file_trouble
from mindspeed.patching.flags import flag, flag_specs, read_flags

_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")


def corpus(folder: Path) -> list[Path]:
    """Python's own sources below its standard library, sorted; tests and installed packages are left out."""
    files = folder.rglob("*.py")
    return sorted(path for path in files if not set(path.relative_to(folder).parts) & set(_SKIPPED))


@dataclass(frozen=True, kw_only=True)
class QuickstartFlags:
    """Options of the command."""

    nproc: int = flag(2, "Processes to train on (default 2).", at_least=1)
    train_iters: int | None = flag(None, "Training steps (default 200).", at_least=1)


def run(argv: list[str]) -> int:
    """Prepare text, train, and say where everything is; returns the exit status.

    Raises:
        ConfigError: a value that cannot be honoured, before anything is written.
    """
    parser = argparse.ArgumentParser(prog="mindspeed quickstart", description=__doc__)
    parser.add_argument("folder", nargs="?", default="mindspeed-quickstart", metavar="DIR", help="Where to put everything.")
    for spec in flag_specs(QuickstartFlags):
        spec.add_to(parser)
    try:
        args = parser.parse_args(argv)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 2
    chosen = read_flags(QuickstartFlags, vars(args))
    folder = Path(args.folder).absolute()
    begun = time.perf_counter()
    try:
        _prepare(folder)
    except OSError as error:
        print(f"mindspeed: {file_trouble(error)}", file=sys.stderr)
        return 1
    status = _train(folder, chosen.nproc, [] if chosen.train_iters is None else ["--train-iters", str(chosen.train_iters)])
    if status == 0:
        _report(folder, chosen.nproc, time.perf_counter() - begun)
    return status


def _prepare(folder: Path) -> None:
    from mindspeed.training import preprocess

    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / "stdlib"
    if (folder / "stdlib_text_document.idx").exists():
        print(f"text: {prefix}_text_document.bin is there already")
        return
    files = corpus(Path(sysconfig.get_paths()["stdlib"]))
    words = ["--input", *map(str, files), "--output-prefix", str(prefix), "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    done = preprocess.preprocess(preprocess.build_parser().parse_args([*words, "--input-format", "text"]))
    print(
        f"text: {done.documents} source files of Python's standard library, {done.tokens / 1e6:.1f} million bytes", flush=True
    )


def _train(folder: Path, nproc: int, more: list[str]) -> int:
    from mindspeed.training.launch import launch
    from mindspeed.training.quickstart import flags

    print(f"training on {nproc} process{'es' if nproc > 1 else ''}; the same by hand:", flush=True)
    print(f"  mindspeed pretrain --nproc {nproc} {shlex.join([*flags(folder), *more])}", flush=True)
    return launch(nproc, [*flags(folder), *more], module="mindspeed.training.quickstart")


def _report(folder: Path, nproc: int, seconds: float) -> None:
    points = [json.loads(line) for line in (folder / "loss.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [point for point in points if point["kind"] == "train"]
    print(f"\nDone in {seconds:.0f} s.")
    if losses:
        first, last = losses[0], losses[-1]
        print(
            f"  loss          {first['loss']:.2f} at step {first['iteration']}, {last['loss']:.2f} at step {last['iteration']}"
        )
    print(f"  loss curve    {folder / 'loss.png'}")
    print(f"  checkpoint    {folder / 'checkpoints'}")
    print(f"  TensorBoard   tensorboard --logdir {folder / 'tensorboard'}")
    sample = folder / "sample.txt"
    if sample.exists():
        print(f"  a sample of 200 bytes ({sample}):\n")
        print("\n".join("    " + line for line in sample.read_text(encoding="utf-8").splitlines()))
    print("\nNext:")
    if sys.prefix != sys.base_prefix:  # the script of the checkout made and entered this environment by itself
        print(f"  in a new shell, first  . {shlex.quote(str(Path(sys.prefix, 'bin', 'activate')))}")
    print(f"  train longer           mindspeed quickstart {shlex.quote(str(folder))} --nproc {nproc} --train-iters 1000")
    print("  your own text          mindspeed preprocess --input my.jsonl --output-prefix my --tokenizer-type ByteTokenizer")
    print("  all features           mindspeed features")
    print("  what a command does    mindspeed explain -- <training flags>")
