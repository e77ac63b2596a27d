"""SwiGLU as autograd functions with the host's `apply` signatures, and its option to keep the input in 8 bits."""

# T tokens, F size of one half

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops.swiglu import bias_swiglu, swiglu, weighted_swiglu

FP8 = torch.float8_e4m3fn


def fused_swiglu(x: Tensor) -> Tensor:
    """`silu(a) * b` for the halves of the last dimension."""
    return swiglu(x, dim=-1)


def _keep(ctx: torch.autograd.function.FunctionCtx, x: Tensor, other: Tensor | None, fp8_input_store: bool) -> None:
    ctx.dtype = x.dtype
    ctx.save_for_backward(x.to(FP8) if fp8_input_store else x, other)


def _kept(ctx: torch.autograd.function.FunctionCtx) -> tuple[Tensor, Tensor | None]:
    x, other = ctx.saved_tensors
    return x.to(ctx.dtype), other


class SwiGLUFunction(torch.autograd.Function):
    """`apply(x, fp8_input_store)`: keeps x, in float8_e4m3fn if asked to."""

    @staticmethod
    def forward(ctx, x, fp8_input_store=False):  # noqa: ANN001, ANN205
        """`swiglu(x)`."""
        _keep(ctx, x, None, fp8_input_store)
        return swiglu(x)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        """Gradient of x."""
        x, _ = _kept(ctx)
        return torch.ops.mindspeed.swiglu_backward(dy, x, x.dim() - 1), None


class BiasSwiGLUFunction(torch.autograd.Function):
    """`apply(x, bias, fp8_input_store)`: keeps x and the bias."""

    @staticmethod
    def forward(ctx, x, bias, fp8_input_store=False):  # noqa: ANN001, ANN205
        """`swiglu(x + bias)`."""
        _keep(ctx, x, bias, fp8_input_store)
        return bias_swiglu(x, bias)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        """Gradients of x and bias."""
        return *torch.ops.mindspeed.bias_swiglu_backward(dy, *_kept(ctx)), None


class WeightedSwiGLUFunction(torch.autograd.Function):
    """`apply(x, weights, fp8_input_store)` with one weight per row: keeps x and the weights."""

    @staticmethod
    def forward(ctx, x, weights, fp8_input_store=False):  # noqa: ANN001, ANN205
        """`swiglu(x) * weights`."""
        _keep(ctx, x, weights, fp8_input_store)
        return weighted_swiglu(x, weights)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        """Gradients of x and weights."""
        return *torch.ops.mindspeed.swiglu_weighted_backward(dy, *_kept(ctx)), None
