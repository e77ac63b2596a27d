"""Arithmetic shared by the quantised operators: scales in disguise, integer products, weights stored as int8."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1024
"""Inner size up to which a float32 product of int8 matrices is exact."""


def float_scale(scale: Tensor) -> Tensor:
    """A scale in float32; int64 and uint64 hold the bit pattern of a float32 in their low half."""
    if scale.dtype in (torch.int64, torch.uint64):
        halves = scale.contiguous().view(torch.int32).view(*scale.shape, 2)
        return halves[..., 0].contiguous().view(torch.float32)
    return scale.to(torch.float32)


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """Exact int32 product of int8 matrices."""
    if x.shape[0] == 0:
        return x.new_zeros(0, weight.shape[1], dtype=torch.int32)
    if x.device.type == "cpu":  # its integer product reads any other weight, an expanded one say, as if it were one of these
        dense = weight.is_contiguous() or weight.t().is_contiguous()
        return torch._int_mm(x.contiguous(), weight if dense else weight.contiguous())
    return integer_product_in_float(x, weight)


def integer_product_in_float(x: Tensor, weight: Tensor) -> Tensor:
    """The same through float32 matrix products, for devices without an integer one."""
    # float32 is exact for up to EXACT products of 2^14, below 2^24 in sum
    parts = (x[:, part].to(torch.float32) @ weight[part].to(torch.float32) for part in _parts(x.shape[1]))
    return sum((part.to(torch.int32) for part in parts), start=x.new_zeros((), dtype=torch.int32))


def _parts(size: int) -> list[slice]:
    return [slice(start, start + EXACT) for start in range(0, size, EXACT)]


def to_int8(values: Tensor) -> Tensor:
    """Round half to even and saturate."""
    return values.round().clamp_(-128, 127).to(torch.int8)


def widened_weight(weight: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype, group_size: int = 0) -> Tensor:
    """`(weight + offset) * scale` in float32, rounded to `dtype`; weight [..., K, N].

    scale and offset: one number, per column ([N] or [..., 1, N]), or per group of rows ([..., G, N]; `group_size` rows each, or
    K / G if it is 0).
    """
    wide = weight.to(torch.float32)
    parts = [None if value is None else value.to(torch.float32) for value in (scale, offset)]
    scale, offset = (None if part is None else _per_row(part, weight, group_size) for part in parts)
    return ((wide if offset is None else wide + offset) * scale).to(dtype)


def _per_row(values: Tensor, weight: Tensor, group_size: int) -> Tensor:
    rows = weight.shape[-2]
    if values.dim() < 2 or values.shape[-2] == 1:
        return values
    size = group_size or -(-rows // values.shape[-2])
    return values.repeat_interleave(size, -2)[..., :rows, :]
