"""RMSNorm in one operator: `y = x * rsqrt(mean(x^2) + eps) * gamma`, rounded once."""

# H normalised size; "rows" are all leading dimensions flattened

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import column_sums
from mindspeed.ops._norms import blocked_norm, blocked_norm_backward, input_gradient, normalise
from mindspeed.ops._registry import below_autograd, define, register_kernel


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Normalise the last dimension(s) of `x` by their root mean square and multiply by `gamma`.

    x: [..., H], float. gamma: shape of the last dimension(s) of x, dtype of x or float32. Returns the shape and dtype of x.
    All arithmetic is float32 with one rounding (float64 for float64 input). Source: Zhang and Sennrich 2019.
    Raises TypeError, ValueError or RuntimeError naming the argument for a wrong dtype, shape or device.
    """
    _checks.tensor("rms_norm", "x", x)
    _checks.tensor("rms_norm", "gamma", gamma)
    _checks.dtype_of("rms_norm", "gamma", gamma, x.dtype, torch.float32)
    _checks.require("rms_norm", "x", x.dim() >= 1, "must have at least 1 dimension", f"shape {tuple(x.shape)}")
    _checks.require("rms_norm", "gamma", gamma.dim() >= 1, "must have at least 1 dimension", f"shape {tuple(gamma.shape)}")
    _checks.shape("rms_norm", "gamma", gamma, x.shape[-gamma.dim() :])
    _checks.same_device("rms_norm", x=x, gamma=gamma)
    _checks.require("rms_norm", "epsilon", epsilon >= 0, "must not be negative", epsilon)
    if gamma.dim() == 1:
        return torch.ops.mindspeed.rms_norm(x, gamma, epsilon)[0]
    flat = torch.ops.mindspeed.rms_norm(x.flatten(x.dim() - gamma.dim()), gamma.flatten(), epsilon)[0]
    return flat.view(x.shape)


def _reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _checks.wide_dtype(x)
    x_hat, _, rstd = normalise(x.to(wide), eps, centre=False)
    return (x_hat * weight.to(wide)).to(x.dtype).contiguous(), rstd.contiguous()


def _reference_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = _checks.wide_dtype(x)
    x_hat = x.to(wide) * rstd
    dy_wide = dy.to(wide)
    dx = input_gradient(dy_wide * weight.to(wide), x_hat, rstd, centre=False)
    return dx.to(x.dtype).contiguous(), column_sums(dy_wide * x_hat).to(weight.dtype)


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=_checks.wide_dtype(x))


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


class _RmsNorm(torch.autograd.Function):
    """Keeps x, weight and rstd."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: ANN001, ANN205
        y, rstd = below_autograd("rms_norm", x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return y, rstd

    @staticmethod
    def backward(ctx, dy, _drstd):  # noqa: ANN001, ANN205
        if dy is None:
            return None, None, None
        dx, dweight = torch.ops.mindspeed.rms_norm_backward(dy, *ctx.saved_tensors)
        return dx, dweight, None


define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    family="rms_norm",
    reference=_reference,
    fake=_fake,
    autograd=_RmsNorm,
)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)",
    family="rms_norm",
    reference=_reference_backward,
    fake=_fake_backward,
)


@register_kernel("rms_norm", "aten", devices=("cpu",))
def _blocked(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = blocked_norm(x, weight, None, eps, centre=False, wide=_checks.wide_dtype(x))
    return y, rstd


@register_kernel("rms_norm_backward", "aten", devices=("cpu",))
def _blocked_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = blocked_norm_backward(dy, x, weight, None, rstd, want_bias=False)
    return dx, dweight.to(weight.dtype)
