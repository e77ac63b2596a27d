"""What the cases on a CUDA device share: how they are declared, their inputs and peers.

Every case names its floor: bytes that must move or operations that must be done. The check runs on few rows of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._case import Floor, Peer, Run, Timing, case, operator_timing

Measured = Callable[[Run], Timing]

BF16 = torch.bfloat16
CHECKED_ROWS = 64
COMPILED = 8192  # row length at which torch.compile is a peer: every compilation costs seconds of the run
DEVICE = {"devices": ("cuda",), "unit": "device ms"}
BOTH_WAYS = ("forward", "backward")


def normal(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    """Fresh random numbers on the device."""
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def fraction(
    name: str, summary: str, must: float, aim: float, make: Callable[[], Timing], feature: str = "", preset: str = "standard"
) -> Measured:
    """A case of the module of `make` whose figure is floor / ours."""

    def measured(run: Run) -> Timing:
        return make()

    measured.__doc__, measured.__module__ = summary, make.__module__
    owner = feature or name.partition(".")[0]
    declare = case(f"ops.cuda.{name}", feature=owner, metric="fraction", must=must, aim=aim, preset=preset, **DEVICE)
    return declare(measured)


def by_rows(fn: Any, reference: Any, inputs: Callable[[int], tuple], rows: int, mode: str, nbytes: int, **peers: Any) -> Timing:
    """A `Timing` of a streaming operator; `inputs(rows)` makes its arguments."""
    return operator_timing(
        fn, reference, lambda: inputs(rows), mode=mode, peers={"eager": reference, **peers}, floor=Floor(bytes=nbytes),
        workload={"rows": rows, "mode": mode}, check_inputs=lambda: inputs(CHECKED_ROWS),
    )  # fmt: skip


def compiled(function: Any) -> Peer:
    return Peer(make=lambda: torch.compile(function, dynamic=False), version=torch.__version__)


def liger(path: str, attribute: str) -> Peer:
    """A function of Liger-Kernel, where it is installed."""

    def make() -> Any:
        import importlib

        return getattr(importlib.import_module(f"liger_kernel.ops.{path}"), attribute).apply

    return Peer(make=make, version="liger-kernel")
