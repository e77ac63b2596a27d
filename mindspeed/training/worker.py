"""Entry point of one rank: run the trainer, and turn whatever goes wrong into one report."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindspeed.errors import MindspeedError
from mindspeed.training.launch import ERROR_FILE, LAUNCHER, REFUSED

FAILED = 1
# What megatron-core logs as warnings although nothing is amiss: evaluation switches the rerun machine off and on.
_IDLE = ("Setting RerunStateMachine mode", "RerunStateMachine initialized")


def main(argv: Sequence[str]) -> int:
    """Train with this command line; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        return print_help()
    return guarded(lambda: _pretrain(list(argv)))


def print_help() -> int:
    """Print all flags, those of features included."""
    from mindspeed.training.arguments import build_parser

    build_parser().print_help()
    return 0


def _pretrain(argv: list[str]) -> None:
    from mindspeed.host.level0 import import_core
    from mindspeed.platform import current

    import_core(current())  # quietly, and without compiling what the device gains nothing from
    from mindspeed.host.megatron_defaults import allow_one_connection

    allow_one_connection(current().name)  # or the host's layers warn of a CUDA variable that means nothing here
    from mindspeed.training import pretraining

    pretraining.pretrain(argv=argv)


def guarded(work: Callable[[], Any]) -> int:
    """Run one rank's work.

    Returns:
        0, 1 after a failure, 2 after a refusal before the start (`ConfigError`), or the code of a SystemExit.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_worth_reading)
    # megatron-core asks every parameter for its gradient, also the distributed optimizer's shards, which are views
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    faulthandler.enable()
    _follow_launcher()
    try:
        work()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except MindspeedError as error:
        _report(str(error), "")
        return REFUSED if isinstance(error, ValueError) else FAILED
    except BaseException as error:
        _report(f"{type(error).__name__}: {error}", traceback.format_exc())
        return FAILED
    return 0


def _worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_IDLE)


def _report(summary: str, trace: str) -> None:
    """Hand the failure to the launcher, or print it where there is none."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        if os.environ.get("RANK", "0") == "0" or trace:
            print(trace or f"mindspeed: {summary}", file=sys.stderr, flush=True)
        return
    report = {"time": time.time(), "summary": summary, "trace": trace}
    Path(path).write_text(json.dumps(report), encoding="utf-8")


def _follow_launcher() -> None:
    """End this process soon after its launcher has gone, however that happened."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1.0)
        print("mindspeed: the launcher is gone, this rank ends", file=sys.stderr, flush=True)
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True, name="follow-launcher").start()
