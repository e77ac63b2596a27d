"""Dropout, scales, residual and norm in one pass over the row; the mask comes from Philox in the kernel, also in backward."""

# H hidden size; Z dropout mask / (1 - p); u what is normalised, "pre" is u as kept

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._launch import Build, as_rows, row_block, row_programs, too_long, triton_body


@triton.jit
def _keep(seed, offset, row, cols, p):
    """True where the element is kept. The counter is (column, row, offset): no two elements of a run share one."""
    zero = (cols * 0).to(tl.uint32)
    offset = tl.cast(offset, tl.int64)  # small integers arrive as int32, and 1 as a constant
    low, high = zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32)
    bits, _, _, _ = tl.philox(tl.cast(seed, tl.int64), cols.to(tl.uint32), zero + tl.cast(row, tl.uint32), low, high)
    return tl.uint_to_uniform_float(bits) >= p


@triton.jit(do_not_specialize=["seed", "offset"])
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, rowscale_ptr, layerscale_ptr, y_ptr, pre_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, size, seed, offset, p, factor, eps,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ROWSCALE: tl.constexpr, LAYERSCALE: tl.constexpr, DROPOUT: tl.constexpr,
    RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    u = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32) * factor
    if ROWSCALE:
        u *= tl.load(rowscale_ptr + row).to(tl.float32)
    if LAYERSCALE:
        u *= tl.load(layerscale_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        u = tl.where(_keep(seed, offset, row, cols, p), u, 0.0)
    if RESIDUAL:
        u += tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(pre_ptr + row * size + cols, u, mask=inside)
    if not RMS:
        mean = tl.sum(u, 0) / size
        tl.store(mean_ptr + row, mean)
        u = tl.where(inside, u - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(u * u, 0) / size + eps)
    tl.store(rstd_ptr + row, rstd)
    y = u * rstd * tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * size + cols, y, mask=inside)


@triton.jit(do_not_specialize=["seed", "offset"])
def _backward(
    dy_ptr, dpre_ptr, x_ptr, pre_ptr, weight_ptr, rowscale_ptr, layerscale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, drowscale_ptr, partial_ptr, dy_stride, dpre_stride, x_stride, rows, size, rows_per_program, partial_stride,
    seed, offset, p, factor,
    DPRE: tl.constexpr, SCALES: tl.constexpr, RESIDUAL: tl.constexpr, ROWSCALE: tl.constexpr, LAYERSCALE: tl.constexpr,
    DROPOUT: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    column_factor = 1.0
    if LAYERSCALE:
        column_factor = tl.load(layerscale_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    dlayerscale = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, rows)):
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=inside, other=0.0).to(tl.float32)
        x_hat = tl.load(pre_ptr + row * size + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if not RMS:
            x_hat = tl.where(inside, x_hat - tl.load(mean_ptr + row), 0.0)
        x_hat *= rstd
        dweight += dy * x_hat
        dbias += dy
        g = dy * weight
        du = g - x_hat * (tl.sum(g * x_hat, 0) / size)
        if not RMS:
            du -= tl.sum(g, 0) / size
        du *= rstd
        if DPRE:
            du += tl.load(dpre_ptr + row * dpre_stride + cols, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            tl.store(dresidual_ptr + row * size + cols, du, mask=inside)
        kept = du * factor
        if DROPOUT:
            kept = tl.where(_keep(seed, offset, row, cols, p), kept, 0.0)
        row_factor = 1.0
        if ROWSCALE:
            row_factor = tl.load(rowscale_ptr + row).to(tl.float32)
        if SCALES:
            product = kept * tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
            dlayerscale += tl.where(inside, product * row_factor, 0.0)
            if ROWSCALE:
                tl.store(drowscale_ptr + row, tl.sum(tl.where(inside, product * column_factor, 0.0), 0))
        tl.store(dx_ptr + row * size + cols, kept * row_factor * column_factor, mask=inside)
    partial = partial_ptr + program * size + cols
    tl.store(partial, dweight, mask=inside)
    tl.store(partial + partial_stride, dbias, mask=inside)
    tl.store(partial + 2 * partial_stride, dlayerscale, mask=inside)


@triton.jit(do_not_specialize=["seed", "offset"])
def _mask(keep_ptr, size, seed, offset, p, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    tl.store(keep_ptr + row * size + cols, _keep(seed, offset, row, cols, p).to(tl.uint8), mask=cols < size)


def _random_state(rng: Tensor | None, p: float) -> tuple[int, int, float, float]:
    """(seed, offset, p, factor of what is kept)."""
    seed, offset = rng.tolist() if rng is not None else (0, 0)
    return seed, offset, p, 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def _or(value: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer that the kernel may be given in place of an absent argument."""
    return stand_in if value is None else value.contiguous()


@triton_body("dropout_add_norm", npu=True, declines=lambda x0, *_: too_long(x0.shape[-1]))
def dropout_add_norm(
    x0: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, rowscale: Tensor | None,
    layerscale: Tensor | None, rng: Tensor | None, p: float, eps: float, rms: bool, pre_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward; returns y, pre, mean (empty for RMSNorm), rstd."""
    x_rows = as_rows(x0)
    rows, size = x_rows.shape
    residual_rows = x_rows if residual is None else as_rows(residual)
    y, pre = (torch.empty(x0.shape, dtype=dtype, device=x0.device) for dtype in (x0.dtype, pre_dtype))
    rstd = torch.empty((*x0.shape[:-1], 1), dtype=torch.float32, device=x0.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    _forward[(rows,)](
        x_rows, residual_rows, weight.contiguous(), _or(bias, x_rows), _or(rowscale, x_rows), _or(layerscale, x_rows),
        y, pre, mean, rstd, x_rows.stride(0), residual_rows.stride(0), size, *_random_state(rng, p), eps,
        RESIDUAL=residual is not None, BIAS=bias is not None, ROWSCALE=rowscale is not None,
        LAYERSCALE=layerscale is not None, DROPOUT=rng is not None, RMS=rms, **row_block(size),
    )  # fmt: skip
    return y, pre, mean, rstd


@triton_body("dropout_add_norm_backward", npu=True, declines=lambda dy, *_: too_long(dy.shape[-1]))
def dropout_add_norm_backward(
    dy: Tensor, dpre: Tensor | None, x0: Tensor | None, pre: Tensor, weight: Tensor, rowscale: Tensor | None,
    layerscale: Tensor | None, mean: Tensor, rstd: Tensor, rng: Tensor | None, p: float,
    residual_dtype: torch.dtype | None, bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x0, residual, weight, bias, rowscale, layerscale; empty where there is none to give."""
    dy_rows, nothing = as_rows(dy), pre.new_empty(0)
    rows, size = dy_rows.shape
    dpre_rows, x_rows = (dy_rows if value is None else as_rows(value) for value in (dpre, x0))
    options = row_block(size)
    programs, per_program = row_programs(dy, rows, options["num_warps"])
    dx0 = torch.empty(pre.shape, dtype=dy.dtype, device=dy.device)
    dresidual = nothing if residual_dtype is None else torch.empty(pre.shape, dtype=residual_dtype, device=dy.device)
    drowscale = torch.empty(pre.shape[:-1], dtype=rowscale.dtype, device=dy.device) if rowscale is not None else nothing
    partial = torch.empty(3, programs, size, dtype=torch.float32, device=dy.device)
    _backward[(programs,)](
        dy_rows, dpre_rows, x_rows, pre, weight.contiguous(), _or(rowscale, dy_rows), _or(layerscale, dy_rows),
        mean, rstd, dx0, dresidual, drowscale, partial, dy_rows.stride(0), dpre_rows.stride(0), x_rows.stride(0),
        rows, size, per_program, programs * size, *_random_state(rng, p),
        DPRE=dpre is not None, SCALES=x0 is not None, RESIDUAL=residual_dtype is not None, ROWSCALE=rowscale is not None,
        LAYERSCALE=layerscale is not None, DROPOUT=rng is not None, RMS=mean.numel() == 0, **options,
    )  # fmt: skip
    dweight, dbias, dlayerscale = partial.sum(1)
    return (
        dx0,
        dresidual,
        dweight.to(weight.dtype),
        nothing if bias_dtype is None else dbias.to(bias_dtype),
        nothing if x0 is None else drowscale,
        nothing if x0 is None or layerscale is None else dlayerscale.to(layerscale.dtype),
    )


@triton_body("dropout_mask", npu=True, declines=lambda like, rng, p: too_long(like.shape[-1]))
def dropout_mask(like: Tensor, rng: Tensor | None, p: float) -> Tensor:
    """The mask that the kernels above use for this random state."""
    if rng is None:
        return torch.full(like.shape, p < 1.0, dtype=torch.bool, device=like.device)
    keep = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    size = like.shape[-1]
    _mask[(like.numel() // size,)](keep.view(torch.uint8), size, *_random_state(rng, p)[:3], **row_block(size))
    return keep


_ALL = {"RESIDUAL": True, "ROWSCALE": True, "LAYERSCALE": True, "DROPOUT": True, "RMS": False, "BLOCK": 4096}
BUILDS = (
    Build(
        _forward,
        "*bf16 *fp32 *fp32 *fp32 *bf16 *fp32 *bf16 *fp32 *fp32 *fp32 i64 i64 i32 i64 i64 fp32 fp32 fp32",
        _ALL | {"BIAS": True},
        {"num_warps": 16},
    ),
    Build(
        _backward,
        "*bf16 *fp32 *bf16 *fp32 *fp32 *bf16 *fp32 *fp32 *fp32 *bf16 *fp32 *bf16 *fp32 i64 i64 i64 i32 i32 i32 i32 i64 i64 fp32 fp32",
        _ALL | {"DPRE": True, "SCALES": True},
        {"num_warps": 16},
    ),
    Build(_mask, "*u8 i32 i64 i64 fp32", {"BLOCK": 4096}),
)
