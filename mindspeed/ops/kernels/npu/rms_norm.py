"""RMSNorm through `npu_rms_norm`."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take


def _declines(x: Tensor, *_: object) -> str | None:
    return cannot_take("npu_rms_norm", x, dims=range(2, 9))


@register_kernel("rms_norm", "npu", devices=("npu",), declines=_declines)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Forward; returns y like x and rstd [..., 1] in float32."""
    y, rstd = torch_npu.npu_rms_norm(_like_weight(x, weight), weight, epsilon=eps)
    return y.to(x.dtype), rstd


@register_kernel("rms_norm_backward", "npu", devices=("npu",), declines=_declines)
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the kernel sums the second in float32."""
    dx, dweight = torch_npu.npu_rms_norm_backward(_like_weight(dy, weight), _like_weight(x, weight), weight, rstd)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _like_weight(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel wants one dtype; a float32 weight with 16-bit x means float32 arithmetic, rounded by the caller."""
    return x if x.dtype == weight.dtype else x.to(torch.float32)
