"""Row arithmetic shared by RMSNorm, LayerNorm and their fusions: plain form, and blocks of rows for the CPU."""

# H normalised size, R rows; "wide" is float32, or float64 for float64 input

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._blocks import block_rows, row_blocks, widen


def normalise(u: Tensor, eps: float, centre: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(x_hat, mean, rstd)` of wide u over the last dimension; mean is None without centring (RMSNorm)."""
    mean = u.mean(-1, keepdim=True) if centre else None
    u = u - mean if centre else u
    rstd = (u.square().mean(-1, keepdim=True) + eps).rsqrt()
    return u * rstd, mean, rstd


def normalised(u: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """x_hat of wide u from kept statistics."""
    return (u if mean is None else u - mean) * rstd


def input_gradient(g: Tensor, x_hat: Tensor, rstd: Tensor, centre: bool) -> Tensor:
    """Gradient of u for wide `g = dy * weight`."""
    inner = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    return rstd * (inner - g.mean(-1, keepdim=True) if centre else inner)


def normalise_block(work: Tensor, out: Tensor, eps: float, mean: Tensor | None, rstd: Tensor) -> None:
    """Write x_hat of `work` [R, H] to `out` and the statistics to `mean`, `rstd` [R, 1]; out may be work."""
    size = work.shape[1]
    if mean is not None:
        torch.mean(work, 1, keepdim=True, out=mean)
        work = torch.sub(work, mean, out=out)
    torch.linalg.vecdot(work, work, out=rstd.squeeze(1))
    rstd.div_(size).add_(eps).rsqrt_()
    torch.mul(work, rstd, out=out)


def gradient_block(g: Tensor, x_hat: Tensor, centre: bool) -> None:
    """Turn wide `g = dy * weight` [R, H] into the gradient of u divided by rstd, in place."""
    projection = torch.linalg.vecdot(g, x_hat).div_(g.shape[1]).unsqueeze(1)
    if centre:
        g.sub_(g.mean(1, keepdim=True))
    g.addcmul_(x_hat, projection, value=-1)


def blocked_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centre: bool, wide: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(y, mean, rstd)` on CPU, a cache-sized block of rows at a time."""
    size = x.shape[-1]
    x_rows = x.reshape(-1, size)
    rows = x_rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=wide)
    mean = torch.empty_like(rstd) if centre else None
    y_rows, rstd_rows, mean_rows = y.view(rows, size), rstd.view(rows, 1), mean.view(rows, 1) if centre else None
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    buffer = torch.empty(block_rows(rows, size * 4), size, dtype=wide)
    for block in row_blocks(rows, size * 4):
        work = widen(x_rows[block], buffer)
        out = buffer[: work.shape[0]]
        normalise_block(work, out, eps, mean_rows[block] if centre else None, rstd_rows[block])
        scale_and_store(out, weight, bias, y_rows[block])
    return y, mean, rstd


def scale_and_store(x_hat: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write `x_hat * weight + bias` to y with one rounding; x_hat is used as work space."""
    if bias is not None:
        y.copy_(torch.addcmul(bias, x_hat, weight, out=x_hat))
    elif y.dtype == x_hat.dtype:
        torch.mul(x_hat, weight, out=y)
    else:
        y.copy_(x_hat.mul_(weight))


def blocked_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(dx, dweight, dbias)` on CPU; the last two are wide."""
    wide, size = rstd.dtype, x.shape[-1]
    x_rows, dy_rows, rstd_rows = x.reshape(-1, size), dy.reshape(-1, size), rstd.reshape(-1, 1)
    mean_rows = None if mean is None else mean.reshape(-1, 1)
    rows = x_rows.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype)
    dx_rows, weight = dx.view(rows, size), weight.to(wide)
    step = block_rows(rows, size * 4)
    x_hat_buffer, g_buffer, dy_buffer = (torch.empty(step, size, dtype=wide) for _ in range(3))
    # one partial sum per row of a block: fewer roundings, and no reduction inside the loop
    dweight = torch.zeros(step, size, dtype=wide)
    dbias = torch.zeros(step, size, dtype=wide) if want_bias else None
    for block in row_blocks(rows, size * 4):
        scale = rstd_rows[block]
        n = scale.shape[0]
        x_hat, g, dy_wide = x_hat_buffer[:n], g_buffer[:n], widen(dy_rows[block], dy_buffer)
        x_wide = widen(x_rows[block], x_hat)
        if mean is not None:
            x_wide = torch.sub(x_wide, mean_rows[block], out=x_hat)
        torch.mul(x_wide, scale, out=x_hat)
        dweight[:n].addcmul_(dy_wide, x_hat)
        if want_bias:
            dbias[:n].add_(dy_wide)
        torch.mul(dy_wide, weight, out=g)
        gradient_block(g, x_hat, centre=mean is not None)
        if dx.dtype == wide:
            torch.mul(g, scale, out=dx_rows[block])
        else:
            dx_rows[block].copy_(g.mul_(scale))
    return dx, dweight.sum(0), dbias.sum(0) if want_bias else None
