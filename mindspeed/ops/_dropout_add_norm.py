"""Operator `dropout_add_norm`: `u = x0 * rowscale * layerscale * Z + residual`, then LayerNorm or RMSNorm of u.

Public forms: `mindspeed.ops.dropout_add_layer_norm` and `mindspeed.ops.dropout_add_rms_norm`.
"""

# B batch, S sequence, H hidden; Z dropout mask / (1 - p); "pre" is u in the dtype it is kept and returned in

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import block_rows, column_sums, row_blocks, widen
from mindspeed.ops._norms import gradient_block, input_gradient, normalise, normalise_block, normalised, scale_and_store
from mindspeed.ops._random import draw, keep_mask
from mindspeed.ops._registry import below_autograd, define, register_kernel


def dropout_add_norm(
    op: str,
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    *,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
) -> Tensor | tuple[Tensor, ...]:
    """Check, draw the random state and run; the public functions give `op`, their own name."""
    _check(op, x0, residual, weight, bias, rowscale, layerscale)
    _checks.require(op, "dropout_p", 0.0 <= dropout_p <= 1.0, "must lie in [0, 1]", dropout_p)
    _checks.require(op, "epsilon", epsilon >= 0, "must not be negative", epsilon)
    pre_dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x0.dtype
    rng = draw(x0.device, x0.numel()) if 0.0 < dropout_p < 1.0 else None
    rms = op.endswith("rms_norm")
    y, pre, _, _ = torch.ops.mindspeed.dropout_add_norm(
        x0, residual, weight, bias, rowscale, layerscale, rng, dropout_p, epsilon, rms, pre_dtype
    )
    returned = [y]
    if prenorm:
        returned.append(pre)
    if return_dropout_mask:
        returned.append(torch.ops.mindspeed.dropout_mask(x0, rng, dropout_p))
    return returned[0] if len(returned) == 1 else tuple(returned)


def _check(
    op: str,
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
) -> None:
    _checks.tensor(op, "x0", x0)
    _checks.require(op, "x0", x0.dim() >= 1, "must have at least 1 dimension", f"shape {tuple(x0.shape)}")
    size = x0.shape[-1:]
    expected = {
        "residual": (residual, x0.shape, (x0.dtype, torch.float32)),
        "weight": (weight, size, (x0.dtype, torch.float32)),
        "bias": (bias, size, (x0.dtype, torch.float32)),
        "rowscale": (rowscale, x0.shape[:-1], (x0.dtype,)),
        "layerscale": (layerscale, size, (weight.dtype if isinstance(weight, Tensor) else x0.dtype,)),
    }
    for name, (value, shape, dtypes) in expected.items():
        if value is None and name != "weight":
            continue
        _checks.tensor(op, name, value)
        _checks.dtype_of(op, name, value, *dtypes)
        _checks.shape(op, name, value, shape)
    _checks.same_device(op, x0=x0, residual=residual, weight=weight, bias=bias, rowscale=rowscale, layerscale=layerscale)


def _kept(values: Tensor, rng: Tensor | None, p: float) -> Tensor:
    """`values * Z`."""
    if p == 0.0:
        return values
    if p == 1.0:
        return torch.zeros_like(values)
    return values * keep_mask(rng, values.shape, p, values.device) / (1.0 - p)


def _scaled(values: Tensor, rowscale: Tensor | None, layerscale: Tensor | None) -> Tensor:
    values = values if rowscale is None else values * rowscale.to(values.dtype).unsqueeze(-1)
    return values if layerscale is None else values * layerscale.to(values.dtype)


class Forward(NamedTuple):
    """The arguments of `dropout_add_norm` in the order of its schema."""

    x0: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    rowscale: Tensor | None
    layerscale: Tensor | None
    rng: Tensor | None
    p: float
    eps: float
    rms: bool
    pre_dtype: torch.dtype


class Backward(NamedTuple):
    """The arguments of `dropout_add_norm_backward`; x0 is there only if one of the scales wants a gradient."""

    dy: Tensor
    dpre: Tensor | None
    x0: Tensor | None
    pre: Tensor
    weight: Tensor
    rowscale: Tensor | None
    layerscale: Tensor | None
    mean: Tensor
    rstd: Tensor
    rng: Tensor | None
    p: float
    residual_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None


def _reference(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, residual, weight, bias, rowscale, layerscale, rng, p, eps, rms, pre_dtype = Forward(*args)
    wide = _checks.wide_dtype(x0)
    u = _kept(_scaled(x0.to(wide), rowscale, layerscale), rng, p)
    u = u if residual is None else u + residual.to(wide)
    x_hat, mean, rstd = normalise(u, eps, centre=not rms)
    y = x_hat * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    pre = torch.empty(x0.shape, dtype=pre_dtype, device=x0.device).copy_(u)
    return y.to(x0.dtype).contiguous(), pre, rstd.new_empty(0) if mean is None else mean.contiguous(), rstd.contiguous()


def _fake(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = Forward(*args)
    wide, stats = _checks.wide_dtype(a.x0), (*a.x0.shape[:-1], 1)
    mean = a.x0.new_empty(0 if a.rms else stats, dtype=wide)
    pre = a.x0.new_empty(a.x0.shape, dtype=a.pre_dtype)
    return a.x0.new_empty(a.x0.shape), pre, mean, a.x0.new_empty(stats, dtype=wide)


def _reference_backward(*args: object) -> tuple[Tensor, ...]:
    dy, dpre, x0, pre, weight, rowscale, layerscale, mean, rstd, rng, p, residual_dtype, bias_dtype = Backward(*args)
    wide, centre = rstd.dtype, mean.numel() > 0
    x_hat, dy_wide = normalised(pre.to(wide), mean if centre else None, rstd), dy.to(wide)
    du = input_gradient(dy_wide * weight.to(wide), x_hat, rstd, centre)
    du = du if dpre is None else du + dpre.to(wide)
    dscaled = _kept(du, rng, p)
    drowscale, dlayerscale = pre.new_empty(0), pre.new_empty(0)
    if x0 is not None:  # kept only if one of the scales wants a gradient
        product = dscaled * x0.to(wide)
        if rowscale is not None:
            drowscale = _scaled(product, None, layerscale).sum(-1).to(rowscale.dtype)
        if layerscale is not None:
            dlayerscale = column_sums(_scaled(product, rowscale, None)).to(layerscale.dtype)
    return (
        _scaled(dscaled, rowscale, layerscale).to(dy.dtype).contiguous(),
        pre.new_empty(0) if residual_dtype is None else du.to(residual_dtype, copy=True).contiguous(),
        column_sums(dy_wide * x_hat).to(weight.dtype),
        pre.new_empty(0) if bias_dtype is None else column_sums(dy_wide).to(bias_dtype),
        drowscale,
        dlayerscale,
    )


def _fake_backward(*args: object) -> tuple[Tensor, ...]:
    a = Backward(*args)

    def like(value: object, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        return a.pre.new_empty(0) if value is None else a.pre.new_empty(shape, dtype=dtype)

    return (
        a.dy.new_empty(a.pre.shape),
        like(a.residual_dtype, a.pre.shape, a.residual_dtype),
        a.weight.new_empty(a.weight.shape),
        like(a.bias_dtype, a.weight.shape, a.bias_dtype),
        a.pre.new_empty(0) if a.x0 is None or a.rowscale is None else a.rowscale.new_empty(a.rowscale.shape),
        a.pre.new_empty(0) if a.x0 is None or a.layerscale is None else a.layerscale.new_empty(a.layerscale.shape),
    )


class _DropoutAddNorm(torch.autograd.Function):
    """Keeps pre, weight, the statistics and the random state; x0 only for a gradient of a scale."""

    @staticmethod
    def forward(ctx, x0, residual, weight, bias, rowscale, layerscale, rng, p, eps, rms, pre_dtype):  # noqa: ANN001, ANN205
        args = (x0, residual, weight, bias, rowscale, layerscale, rng, p, eps, rms, pre_dtype)
        y, pre, mean, rstd = below_autograd("dropout_add_norm", *args)
        needs_x0 = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.save_for_backward(x0 if needs_x0 else None, pre, weight, rowscale, layerscale, mean, rstd, rng)
        ctx.p, ctx.x0_dtype = p, x0.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, pre, mean, rstd

    @staticmethod
    def backward(ctx, dy, dpre, _dmean, _drstd):  # noqa: ANN001, ANN205
        x0, pre, weight, rowscale, layerscale, mean, rstd, rng = ctx.saved_tensors
        if dy is None and dpre is None:
            return (None,) * 11
        if dy is None:
            dy = torch.zeros(pre.shape, dtype=ctx.x0_dtype, device=pre.device)
        grads = torch.ops.mindspeed.dropout_add_norm_backward(
            dy, dpre, x0, pre, weight, rowscale, layerscale, mean, rstd, rng, ctx.p, ctx.residual_dtype, ctx.bias_dtype
        )
        wanted = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:6], strict=True))
        return *wanted, None, None, None, None, None


define(
    "dropout_add_norm(Tensor x0, Tensor? residual, Tensor weight, Tensor? bias, Tensor? rowscale, Tensor? layerscale,"
    " Tensor? rng, float p, float eps, bool rms, ScalarType pre_dtype) -> (Tensor y, Tensor pre, Tensor mean, Tensor rstd)",
    family="dropout_add_norm",
    reference=_reference,
    fake=_fake,
    autograd=_DropoutAddNorm,
)
define(
    "dropout_add_norm_backward(Tensor dy, Tensor? dpre, Tensor? x0, Tensor pre, Tensor weight, Tensor? rowscale,"
    " Tensor? layerscale, Tensor mean, Tensor rstd, Tensor? rng, float p, ScalarType? residual_dtype, ScalarType? bias_dtype)"
    " -> (Tensor dx0, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor drowscale, Tensor dlayerscale)",
    family="dropout_add_norm",
    reference=_reference_backward,
    fake=_fake_backward,
)
define(
    "dropout_mask(Tensor like, Tensor? rng, float p) -> Tensor",
    family="dropout_add_norm",
    reference=lambda like, rng, p: keep_mask(rng, like.shape, p, like.device),
    fake=lambda like, rng, p: like.new_empty(like.shape, dtype=torch.bool),
)


@register_kernel("dropout_add_norm", "aten", devices=("cpu",))
def _blocked(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, residual, weight, bias, rowscale, layerscale, rng, p, eps, rms, pre_dtype = Forward(*args)
    wide, size = _checks.wide_dtype(x0), x0.shape[-1]
    rows = x0.numel() // size
    y, pre = torch.empty(x0.shape, dtype=x0.dtype), torch.empty(x0.shape, dtype=pre_dtype)
    rstd = torch.empty((*x0.shape[:-1], 1), dtype=wide)
    mean = None if rms else torch.empty_like(rstd)
    keep = keep_mask(rng, (rows, size), p, x0.device) if p > 0 else None
    row_factor = None if rowscale is None else rowscale.reshape(rows, 1).to(wide)
    column_factor, weight = None if layerscale is None else layerscale.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    x_rows, residual_rows = x0.reshape(rows, size), None if residual is None else residual.reshape(rows, size)
    buffer, other = (torch.empty(block_rows(rows, size * 4), size, dtype=wide) for _ in range(2))
    for block in row_blocks(rows, size * 4):
        n = block.stop - block.start
        u = buffer[:n].copy_(x_rows[block])
        _scale_block(u, row_factor, column_factor, keep, p, block, other[:n])
        if residual is not None:
            u.add_(widen(residual_rows[block], other))
        pre.view(rows, size)[block] = u
        normalise_block(u, u, eps, None if rms else mean.view(rows, 1)[block], rstd.view(rows, 1)[block])
        scale_and_store(u, weight, bias, y.view(rows, size)[block])
    return y, pre, rstd.new_empty(0) if rms else mean, rstd


def _scale_block(
    u: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    keep: Tensor | None,
    p: float,
    block: slice,
    work: Tensor,
) -> None:
    """`u *= rowscale * layerscale * Z` for one block of rows."""
    if row_factor is not None:
        u.mul_(row_factor[block])
    if column_factor is not None:
        u.mul_(column_factor)
    if p == 1.0:
        u.zero_()
    elif keep is not None:
        u.mul_(work.copy_(keep[block])).mul_(1.0 / (1.0 - p))


def _scales_want_gradients(*args: object) -> str | None:
    return None if Backward(*args).x0 is None else "rowscale or layerscale wants a gradient"


@register_kernel("dropout_add_norm_backward", "aten", devices=("cpu",), declines=_scales_want_gradients)
def _blocked_backward(*args: object) -> tuple[Tensor, ...]:
    dy, dpre, _, pre, weight, rowscale, layerscale, mean, rstd, rng, p, residual_dtype, bias_dtype = Backward(*args)
    wide, size, centre = rstd.dtype, pre.shape[-1], mean.numel() > 0
    rows = pre.numel() // size
    dx0 = torch.empty(pre.shape, dtype=dy.dtype)
    dresidual = pre.new_empty(0) if residual_dtype is None else torch.empty(pre.shape, dtype=residual_dtype)
    keep = keep_mask(rng, (rows, size), p, pre.device) if p > 0 else None
    row_factor = None if rowscale is None else rowscale.reshape(rows, 1).to(wide)
    column_factor, weight_wide = None if layerscale is None else layerscale.to(wide), weight.to(wide)
    pre_rows, dy_rows, rstd_rows = pre.reshape(rows, size), dy.reshape(rows, size), rstd.view(rows, 1)
    dpre_rows = None if dpre is None else dpre.reshape(rows, size)
    step = block_rows(rows, size * 4)
    x_hat_buffer, du_buffer, work_buffer = (torch.empty(step, size, dtype=wide) for _ in range(3))
    dweight, dbias = (torch.zeros(step, size, dtype=wide) for _ in range(2))
    for block in row_blocks(rows, size * 4):
        n = block.stop - block.start
        x_hat, du, work = x_hat_buffer[:n].copy_(pre_rows[block]), du_buffer[:n], work_buffer[:n].copy_(dy_rows[block])
        if centre:
            x_hat.sub_(mean.view(rows, 1)[block])
        x_hat.mul_(rstd_rows[block])
        dweight[:n].addcmul_(work, x_hat)
        if bias_dtype is not None:
            dbias[:n].add_(work)
        torch.mul(work, weight_wide, out=du)
        gradient_block(du, x_hat, centre)
        du.mul_(rstd_rows[block])
        if dpre is not None:
            du.add_(widen(dpre_rows[block], work))
        if residual_dtype is not None:
            dresidual.view(rows, size)[block] = du
        _scale_block(du, row_factor, column_factor, keep, p, block, work)
        dx0.view(rows, size)[block] = du
    dbias = pre.new_empty(0) if bias_dtype is None else dbias.sum(0).to(bias_dtype)
    return dx0, dresidual, dweight.sum(0).to(weight.dtype), dbias, pre.new_empty(0), pre.new_empty(0)
