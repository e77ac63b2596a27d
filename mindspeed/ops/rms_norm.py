"""RMSNorm in one operator: `y = x * rsqrt(mean(x^2) + eps) * gamma`, rounded once."""

# H normalised size; "rows" are all leading dimensions flattened

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import block_rows, row_blocks, widen
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
    x_wide = x.to(wide)
    rstd = (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x_wide * rstd * weight.to(wide)).to(x.dtype).contiguous(), rstd.contiguous()


def _reference_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = _checks.wide_dtype(x)
    x_hat = x.to(wide) * rstd
    dy_wide = dy.to(wide)
    g = dy_wide * weight.to(wide)
    dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dweight = (dy_wide * x_hat).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


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
    wide = _checks.wide_dtype(x)
    size = x.shape[-1]
    x_rows = x.reshape(-1, size)
    rows = x_rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=wide)
    y_rows, rstd_rows, weight_wide = y.view(rows, size), rstd.view(rows, 1), weight.to(wide)
    buffer = torch.empty(block_rows(rows, size * 4), size, dtype=wide)
    for block in row_blocks(rows, size * 4):
        work, scale = widen(x_rows[block], buffer), rstd_rows[block]
        torch.linalg.vecdot(work, work, out=scale.squeeze(1))
        scale.div_(size).add_(eps).rsqrt_()
        out = buffer[: work.shape[0]]
        torch.mul(work, scale, out=out)
        if y.dtype == wide:
            torch.mul(out, weight_wide, out=y_rows[block])
        else:
            y_rows[block].copy_(out.mul_(weight_wide))
    return y, rstd


@register_kernel("rms_norm_backward", "aten", devices=("cpu",))
def _blocked_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = rstd.dtype
    size = x.shape[-1]
    x_rows, dy_rows, rstd_rows = x.reshape(-1, size), dy.reshape(-1, size), rstd.reshape(-1, 1)
    rows = x_rows.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype)
    dx_rows, weight_wide = dx.view(rows, size), weight.to(wide)
    step = block_rows(rows, size * 4)
    x_hat_buffer, g_buffer, dy_buffer = (torch.empty(step, size, dtype=wide) for _ in range(3))
    dweight = torch.zeros(step, size, dtype=wide)  # one partial sum per row of a block: fewer roundings, no reduction inside
    for block in row_blocks(rows, size * 4):
        scale = rstd_rows[block]
        n = scale.shape[0]
        x_hat, g, dy_wide = x_hat_buffer[:n], g_buffer[:n], widen(dy_rows[block], dy_buffer)
        torch.mul(widen(x_rows[block], x_hat), scale, out=x_hat)
        dweight[:n].addcmul_(dy_wide, x_hat)
        torch.mul(dy_wide, weight_wide, out=g)
        g.addcmul_(x_hat, torch.linalg.vecdot(g, x_hat).div_(size).unsqueeze(1), value=-1)
        if dx.dtype == wide:
            torch.mul(g, scale, out=dx_rows[block])
        else:
            dx_rows[block].copy_(g.mul_(scale))
    return dx, dweight.sum(0).to(weight.dtype)
