"""A rank without torch, for tests of the launcher: what it does is its command line."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mindspeed.errors import ConfigError, Problem
from mindspeed.training.worker import guarded


def work(action: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if action == "environment":
        (folder / f"rank{rank}").write_text(
            f"{os.environ['WORLD_SIZE']} {os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}"
        )
    elif action == "fail-first" and rank == 1:
        raise RuntimeError("the cause")
    elif action in ("fail-first", "killed"):
        if action == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while not (folder / "pid1").exists():  # ranks start at different speeds
            time.sleep(0.02)
        time.sleep(0.5)
        raise RuntimeError("a consequence")
    elif action == "refuse":
        raise ConfigError([Problem("--x", 1, "is wrong", "use 2")])
    elif action == "wait":
        received = []
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
        (folder / f"ready{rank}").touch()
        while not received:
            time.sleep(0.02)
    elif action == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 1:
            raise RuntimeError("the cause")
        time.sleep(60)
    elif action == "sleep":
        (folder / f"ready{rank}").touch()
        time.sleep(60)


if __name__ == "__main__":
    sys.exit(guarded(lambda: work(sys.argv[1], Path(sys.argv[2]))))
