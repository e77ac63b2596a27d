"""SwiGLU through `npu_swiglu`; bias and weights are added around it, in float32 so that the result is rounded once."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take


def _declines(x: Tensor, *_: object) -> str | None:
    return cannot_take("npu_swiglu", x, dims=range(1, 9))


@register_kernel("swiglu", "npu", devices=("npu",), declines=_declines)
def swiglu(x: Tensor, dim: int) -> Tensor:
    """Forward."""
    return torch_npu.npu_swiglu(x, dim=dim)


@register_kernel("swiglu_backward", "npu", devices=("npu",), declines=_declines)
def swiglu_backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Gradient of x."""
    return torch_npu.npu_swiglu_backward(dy, x, dim=dim)


@register_kernel("bias_swiglu", "npu", devices=("npu",), declines=_declines)
def bias_swiglu(x: Tensor, bias: Tensor) -> Tensor:
    """Forward of `swiglu(x + bias)`."""
    return torch_npu.npu_swiglu(_wide(x) + bias, dim=-1).to(x.dtype)


@register_kernel("bias_swiglu_backward", "npu", devices=("npu",), declines=_declines)
def bias_swiglu_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    dx = torch_npu.npu_swiglu_backward(_wide(dy), _wide(x) + bias, dim=-1)
    return dx.to(x.dtype), dx.reshape(-1, bias.shape[0]).sum(0).to(bias.dtype)


@register_kernel("swiglu_weighted", "npu", devices=("npu",), declines=_declines)
def swiglu_weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Forward of `swiglu(x) * weights`."""
    return torch_npu.npu_swiglu(_wide(x), dim=-1).mul_(weights).to(x.dtype)


@register_kernel("swiglu_weighted_backward", "npu", devices=("npu",), declines=_declines)
def swiglu_weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights."""
    x_wide, dy_wide = _wide(x), _wide(dy)
    dx = torch_npu.npu_swiglu_backward(dy_wide * weights, x_wide, dim=-1)
    dweights = torch_npu.npu_swiglu(x_wide, dim=-1).mul_(dy_wide).sum(-1, keepdim=True)
    return dx.to(x.dtype), dweights.to(weights.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32)
