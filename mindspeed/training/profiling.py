"""Profile some steps: a torch trace, or the range that an outside profiler of CUDA records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch


class StepProfiler:
    """Records from `--profile-step-start` to `--profile-step-end` on the ranks of `--profile-ranks`.

    With `--use-pytorch-profiler` a Chrome trace goes to the TensorBoard folder, or to the checkpoint folder,
    or to the working directory; without it the CUDA profiler (nsys) is started and stopped.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._on = bool(args.profile) and args.rank in args.profile_ranks
        self._trace: Any = None

    def before(self, iteration: int) -> None:
        """Call before each step."""
        if not self._on or iteration != self._args.profile_step_start:
            return
        if self._args.use_pytorch_profiler:
            self._trace = torch.profiler.profile(record_shapes=True, with_stack=True)
            self._trace.start()
        else:
            torch.cuda.cudart().cudaProfilerStart()

    def after(self, iteration: int) -> None:
        """Call after each step with the number of steps done."""
        if self._on and iteration == self._args.profile_step_end:
            self.stop()

    def stop(self) -> None:
        """End a recording that is under way; harmless otherwise."""
        if self._trace is not None:
            self._trace.stop()
            folder = Path(self._args.tensorboard_dir or self._args.save or ".")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"profile_rank{self._args.rank}.json"
            self._trace.export_chrome_trace(str(path))
            self._trace = None
            print(f"  profile: {path}", flush=True)
        elif self._on and not self._args.use_pytorch_profiler:
            torch.cuda.cudart().cudaProfilerStop()
            self._on = False
