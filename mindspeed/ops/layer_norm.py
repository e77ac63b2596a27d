"""LayerNorm in one operator: `y = (x - mean) * rsqrt(var + eps) * weight + bias`, rounded once."""

# H normalised size; "rows" are all leading dimensions flattened

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import column_sums
from mindspeed.ops._norms import blocked_norm, blocked_norm_backward, input_gradient, normalise, normalised
from mindspeed.ops._registry import below_autograd, define, register_kernel


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Normalise the last dimension of `x` by mean and (biased) variance, multiply by `weight` and add `bias`.

    x: [..., H], float. weight, bias: [H], dtype of x or float32. Returns the shape and dtype of x. Keeps x, weight and two
    numbers per row. Source: Ba, Kiros and Hinton 2016.
    """
    _checks.tensor("layer_norm", "x", x)
    _checks.require("layer_norm", "x", x.dim() >= 1, "must have at least 1 dimension", f"shape {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if name == "bias" and value is None:
            continue
        _checks.tensor("layer_norm", name, value)
        _checks.dtype_of("layer_norm", name, value, x.dtype, torch.float32)
        _checks.shape("layer_norm", name, value, x.shape[-1:])
    _checks.same_device("layer_norm", x=x, weight=weight, bias=bias)
    _checks.require("layer_norm", "epsilon", epsilon >= 0, "must not be negative", epsilon)
    return torch.ops.mindspeed.layer_norm(x, weight, bias, epsilon)[0]


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = _checks.wide_dtype(x)
    x_hat, mean, rstd = normalise(x.to(wide), eps, centre=True)
    y = x_hat * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = rstd.dtype
    x_hat, dy_wide = normalised(x.to(wide), mean, rstd), dy.to(wide)
    dx = input_gradient(dy_wide * weight.to(wide), x_hat, rstd, centre=True)
    dbias = x.new_empty(0) if bias is None else column_sums(dy_wide).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), column_sums(dy_wide * x_hat).to(weight.dtype), dbias


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=_checks.wide_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


class _LayerNorm(torch.autograd.Function):
    """Keeps x, weight, bias (for its dtype) and the statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # noqa: ANN001, ANN205
        y, mean, rstd = below_autograd("layer_norm", x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, dy, _dmean, _drstd):  # noqa: ANN001, ANN205
        if dy is None:
            return None, None, None, None
        dx, dweight, dbias = torch.ops.mindspeed.layer_norm_backward(dy, *ctx.saved_tensors)
        return dx, dweight, dbias if ctx.saved_tensors[2] is not None else None, None


define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    family="layer_norm",
    reference=_reference,
    fake=_fake,
    autograd=_LayerNorm,
)
define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    family="layer_norm",
    reference=_reference_backward,
    fake=_fake_backward,
)


@register_kernel("layer_norm", "aten", devices=("cpu",))
def _blocked(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return blocked_norm(x, weight, bias, eps, centre=True, wide=_checks.wide_dtype(x))


@register_kernel("layer_norm_backward", "aten", devices=("cpu",))
def _blocked_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = blocked_norm_backward(dy, x, weight, mean, rstd, want_bias=bias is not None)
    return dx, dweight.to(weight.dtype), x.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "aten's kernel wants weight and bias in the dtype of x"
    return None


@register_kernel("layer_norm", "aten", devices=("cuda", "npu"), declines=lambda x, w, b, eps: _one_dtype(x, w, b))
def _native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_layer_norm(x.contiguous(), x.shape[-1:], weight, bias, eps)


@register_kernel(
    "layer_norm_backward", "aten", devices=("cuda", "npu"), declines=lambda dy, x, w, b, mean, rstd: _one_dtype(x, w, b)
)
def _native_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = [True, True, bias is not None]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(), x.contiguous(), x.shape[-1:], mean, rstd, weight, bias, wanted
    )
    return dx, dweight, x.new_empty(0) if bias is None else dbias
