"""What every Triton body needs: registration, launch sizes, and a description for compiling ahead of time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from mindspeed.ops._registry import register_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter. Its `tl.dot` is wrong on bf16 operands: kernels widen them when this is set."""

MAX_ROW = 65536
"""Longest row that one program holds in registers; longer rows are left to the plain form."""


@dataclass(frozen=True)
class Build:
    """One way a kernel is compiled: types of its run-time arguments in order, and its compile-time constants."""

    kernel: Any
    types: str
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)


def triton_body(
    name: str, *, declines: Callable[..., str | None] | None = None, npu: bool = False, first: bool = False
) -> Callable:
    """Register a Triton body for operator `name`: on CUDA; on CPU under the interpreter; with `npu`, on request there too.

    first: tried before the bodies that are registered with the operator; else after them.
    """

    def decline(*args: object, **kwargs: object) -> str | None:
        if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
            return "float64 is computed by the plain form"
        return declines(*args, **kwargs) if declines else None

    def register(body: Callable) -> Callable:
        guarded = _on_device_of_arguments(body)
        register_kernel(name, "triton", devices=("cuda",), declines=decline, first=first)(guarded)
        on_request = (("cpu",) if INTERPRETED else ()) + (("npu",) if npu else ())
        register_kernel(name, "triton", devices=on_request, declines=decline, opt_in=True)(body)
        return body

    return register


def _on_device_of_arguments(body: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one of the tensors."""

    @functools.wraps(body)
    def guarded(*args: object, **kwargs: object) -> object:
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor) and arg.is_cuda)):
            return body(*args, **kwargs)

    return guarded


def as_rows(x: Tensor) -> Tensor:
    """`x` as [rows, last size] with contiguous rows; a view unless the strides forbid it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def row_block(size: int) -> dict[str, int]:
    """Launch options of a program that holds one row of `size` elements."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def too_long(size: int) -> str | None:
    """Reason to step aside for rows that do not fit one program, else None."""
    return f"rows of {size} elements are longer than {MAX_ROW}" if size > MAX_ROW else None


RESIDENT_WARPS = 32
"""Warps per processor that kernels which add up over rows keep busy: half of what the largest devices hold, enough to hide memory."""


def row_programs(x: Tensor, rows: int, warps: int) -> tuple[int, int]:
    """(programs, rows per program) for kernels that add up over rows, with `warps` warps for each slice of rows.

    A few programs per processor of the device: enough loads are under way, and the partial sums stay few.
    """
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    per_program = triton.cdiv(rows, processors * max(1, RESIDENT_WARPS // warps))
    return triton.cdiv(rows, per_program), per_program
