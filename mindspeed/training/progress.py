"""One updating status line on a terminal: steps, speed, time left, loss."""

from __future__ import annotations

import sys
import time
from typing import Any

from mindspeed.training.report import item


class Progress:
    """Status line of a run; lines printed meanwhile appear above it.

    Args:
        done, total: steps already trained, and steps in all.
    """

    def __init__(self, done: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            transient=True,
        )
        self._task = self._bars.add_task("training", total=total, completed=done, speed="", loss="")
        self._last = time.perf_counter()
        self._bars.start()

    def update(self, iteration: int, losses: dict[str, Any], tokens: int) -> None:
        """Show a finished step of `tokens` tokens."""
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        loss = f"loss {item(losses['lm loss']):.4f}" if "lm loss" in losses else ""
        speed = f"{1 / seconds:.2f} it/s  {tokens / seconds:,.0f} tokens/s"
        self._bars.update(self._task, completed=iteration, speed=speed, loss=loss)

    def close(self) -> None:
        """Remove the status line."""
        self._bars.stop()


def on_terminal() -> bool:
    """Whether standard output is a person's terminal."""
    return sys.stdout.isatty()
