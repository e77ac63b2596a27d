"""What the loop carries from step to step, and the gathers that must pause around saves and evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from mindspeed.training.session import get_args


@dataclasses.dataclass
class Run:
    """What the loop carries from step to step."""

    forward_step: Callable[..., Any]
    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    config: Any
    train_data: Any
    valid_data: Any
    context: dict[str, Any]
    iteration: int
    operations: float


class ParamGatherHooks:
    """Switches the gathers of `--overlap-param-gather` off where parameters must be whole: first step, saves, evaluation."""

    def __init__(self, run: Run) -> None:
        args = get_args()
        self._run = run
        self._used = args.use_distributed_optimizer and args.overlap_param_gather
        self._sync: Any = None
        self._paused = False
        self.on = False

    def hold(self) -> None:
        """Before the first step: errors of loading or initialisation must not spread by a gather."""
        if self._used:
            self._disable(param_sync=False)
            self._sync, self._run.config.param_sync_func = self._run.config.param_sync_func, None

    def after_step(self, *, skipped: bool) -> None:
        """The first step that changed parameters starts the gathers."""
        if self._used and not self.on and not skipped:
            self._run.config.param_sync_func = self._sync
            self._enable()

    def pause(self) -> None:
        """Make all parameters whole and leave them so."""
        if self.on:
            self._disable()
            self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._paused:
            self._paused = False
            self._enable()

    def _enable(self) -> None:
        for chunk in self._run.model:
            chunk.enable_forward_pre_hook()
        self.on = True

    def _disable(self, param_sync: bool = True) -> None:
        for chunk in self._run.model:
            chunk.disable_forward_pre_hook(param_sync=param_sync)
        self.on = False
