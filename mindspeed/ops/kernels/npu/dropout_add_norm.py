"""Dropout, residual and norm on the NPU: one fused kernel where it says the same, else a short row of kernels.

The mask is one bit per element, made from the kept random state in forward and again in backward.
"""

# H hidden size; u what is normalised, "pre" is u as kept

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._dropout_add_norm import _scaled
from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take, lacks


def _declines(x0: Tensor, *_: object) -> str | None:
    # the same answer for all three operators, because their masks must agree
    return (
        cannot_take("npu_rms_norm", x0, dims=range(2, 9))
        or lacks("_npu_dropout_gen_mask")
        or lacks("npu_dropout_backward")
        or lacks("npu_add_rms_norm")
    )


def _bits(like: Tensor, rng: Tensor, p: float) -> Tensor:
    """The mask as bits, the same for the same random state."""
    seed, offset = rng.tolist()
    return torch.ops.npu._npu_dropout_gen_mask.Tensor(like, like.shape, p, seed, offset)


def _dropped(values: Tensor, rng: Tensor | None, p: float) -> Tensor:
    """`values * mask / (1 - p)`."""
    if rng is None:
        return torch.zeros_like(values) if p == 1.0 else values
    # dropout is its own transpose, and only the backward operator takes a given mask without compiling a kernel at run time
    return torch.ops.npu.npu_dropout_backward(values, _bits(values, rng, p), p)


def _is_plain_add(x0, residual, weight, bias, rowscale, layerscale, p, rms, pre_dtype) -> bool:
    one_dtype = residual is not None and residual.dtype == x0.dtype == weight.dtype == pre_dtype
    return rms and one_dtype and p == 0.0 and bias is None and rowscale is None and layerscale is None


@register_kernel("dropout_add_norm", "npu", devices=("npu",), declines=_declines)
def dropout_add_norm(
    x0: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, rowscale: Tensor | None,
    layerscale: Tensor | None, rng: Tensor | None, p: float, eps: float, rms: bool, pre_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward; returns y, pre, mean (empty for RMSNorm), rstd."""
    if _is_plain_add(x0, residual, weight, bias, rowscale, layerscale, p, rms, pre_dtype):
        y, rstd, pre = torch_npu.npu_add_rms_norm(x0, residual, weight, eps)
        return y, pre, rstd.new_empty(0), rstd
    u = _dropped(_scaled(x0.to(torch.float32), rowscale, layerscale), rng, p)
    u = u if residual is None else u + residual
    weight = weight.to(torch.float32)
    bias = None if bias is None else bias.to(torch.float32)
    if rms:
        y, rstd = torch_npu.npu_rms_norm(u, weight, epsilon=eps)
        y, mean = y if bias is None else y + bias, rstd.new_empty(0)
    else:
        y, mean, rstd = torch.ops.aten.native_layer_norm(u, u.shape[-1:], weight, bias, eps)
    pre = u.to(pre_dtype, copy=u is x0)
    return y.to(x0.dtype), pre, mean, rstd


@register_kernel("dropout_add_norm_backward", "npu", devices=("npu",), declines=_declines)
def dropout_add_norm_backward(
    dy: Tensor, dpre: Tensor | None, x0: Tensor | None, pre: Tensor, weight: Tensor, rowscale: Tensor | None,
    layerscale: Tensor | None, mean: Tensor, rstd: Tensor, rng: Tensor | None, p: float,
    residual_dtype: torch.dtype | None, bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x0, residual, weight, bias, rowscale, layerscale; empty where there is none to give."""
    size, nothing = pre.shape[-1], pre.new_empty(0)
    dy_wide, pre_wide, weight_wide = (value.to(torch.float32) for value in (dy, pre, weight))
    if mean.numel() == 0:
        du, dweight = torch_npu.npu_rms_norm_backward(dy_wide, pre_wide, weight_wide, rstd)
    else:
        du, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy_wide, pre_wide, [size], mean, rstd, weight_wide, torch.zeros_like(weight_wide), [True, True, False]
        )
    du = du if dpre is None else du + dpre
    dscaled = _dropped(du, rng, p)
    drowscale, dlayerscale = nothing, nothing
    if x0 is not None:  # kept only if one of the scales wants a gradient
        product = dscaled * x0
        if rowscale is not None:
            drowscale = _scaled(product, None, layerscale).sum(-1).to(rowscale.dtype)
        if layerscale is not None:
            dlayerscale = _scaled(product, rowscale, None).reshape(-1, size).sum(0).to(layerscale.dtype)
    return (
        _scaled(dscaled, rowscale, layerscale).to(dy.dtype),
        nothing if residual_dtype is None else du.to(residual_dtype, copy=True),
        dweight.to(weight.dtype),
        nothing if bias_dtype is None else dy_wide.reshape(-1, size).sum(0).to(bias_dtype),
        drowscale,
        dlayerscale,
    )


@register_kernel("dropout_mask", "npu", devices=("npu",), declines=_declines)
def dropout_mask(like: Tensor, rng: Tensor | None, p: float) -> Tensor:
    """The mask that the kernels above use for this random state, one boolean per element."""
    return _dropped(torch.ones(like.shape, dtype=torch.float32, device=like.device), rng, p) != 0
