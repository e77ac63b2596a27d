"""Choose a kernel per call; a kernel that steps aside says so once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.attention.contract import Kernel, Scoring, statistics_dtype
from mindspeed.notices import log_once


@functools.cache
def kernels_for(device_type: str) -> tuple[Kernel, ...]:
    """Kernels of a device, best first; the last one serves everything."""
    from mindspeed.core.attention.math_kernel import MathKernel

    if device_type == "cpu":
        from mindspeed.core.attention.cpu_kernel import CpuKernel

        return CpuKernel(), MathKernel()
    if device_type == "cuda":
        from mindspeed.core.attention.cuda_kernel import EfficientKernel, FlashKernel

        return FlashKernel(), EfficientKernel(), MathKernel()
    if device_type == "npu":
        from mindspeed.core.attention.npu_kernel import NpuKernel

        return NpuKernel(), MathKernel()
    return (MathKernel(),)


def choose(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, kernels: Sequence[Kernel] | None) -> Kernel:
    """The first kernel that does not decline."""
    for kernel in kernels or kernels_for(q.device.type):
        reason = kernel.declines(q, k, v, scoring)
        if not reason:
            return kernel
        log_once("attention: %s steps aside, %s", kernel.name, reason)
    raise RuntimeError(f"no attention kernel for device {q.device.type} accepts this call")


def attend(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, kernels: Sequence[Kernel] | None = None
) -> tuple[Tensor, Tensor, Any]:
    """Attention of one tile: (out, lse, rng_state). Shapes and meaning: see the contract. Not differentiable by itself."""
    check_shapes(q, k, v)
    if q.shape[2] == 0 or k.shape[2] == 0:
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        return out, q.new_full(q.shape[:-1], float("-inf"), dtype=statistics_dtype(q.dtype)), None
    with torch.no_grad():
        return choose(q, k, v, scoring, kernels).forward(q, k, v, scoring)


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
    rng_state: Any = None,
    kernels: Sequence[Kernel] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of one tile, given the global `out` and `lse` of its rows."""
    if q.shape[2] == 0 or k.shape[2] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with torch.no_grad():
        return choose(q, k, v, scoring, kernels).backward(grad_out, q, k, v, out, lse, scoring, rng_state)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes that no kernel could mean.

    Raises:
        ValueError: ranks, batch, head or length do not fit.
    """
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(
            f"attention: q, k, v must be [B, heads, S, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
