"""Feed-forward network through `npu_ffn`."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.ffn import GATED

INNER_LIMIT = 65536
INTEGER_SCALES = (torch.int64, torch.uint64)
FLOAT16_SCALES = (*INTEGER_SCALES, torch.float32)
"""Dtypes of a dequantisation scale for float16 output, the first two with one scale per column of the inner result."""


def _declines(
    x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, *, inner_precise: int | None = None, **options: object
) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.int8):
        return f"npu_ffn takes 16-bit and int8 input only, not {x.dtype}"
    if activation in GATED and not (x.dtype == weight1.dtype == torch.float16 and inner_precise == 1):
        return f"npu_ffn has {activation} for float16 with inner_precise=1 only"
    if x.dtype == torch.bfloat16 and weight1.dtype == x.dtype and inner_precise == 1:
        return "npu_ffn has inner_precise=1 for float16 only"
    if x.dtype == torch.int8 and (reason := _scales_decline(weight1.dim() - 1, **options)):
        return reason
    sizes = weight1.shape[-2], weight2.shape[-2]
    return f"inner sizes {sizes} are beyond the limits of npu_ffn" if max(sizes) >= INNER_LIMIT else None


def _scales_decline(
    plain_dims: int, *, scale: Tensor, deq_scale1: Tensor, deq_scale2: Tensor, output_dtype: torch.dtype, **_: object
) -> str | None:
    """Which scales the kernel takes for int8; `plain_dims`: dimensions of a scale with one number per column."""
    per_channel = scale.numel() > 1 and scale.dim() == plain_dims
    allowed = (torch.bfloat16,) if output_dtype == torch.bfloat16 else INTEGER_SCALES if per_channel else FLOAT16_SCALES
    if scale.dtype != torch.float32:
        return f"npu_ffn wants a float32 scale, not {scale.dtype}"
    if deq_scale1.dtype != deq_scale2.dtype or deq_scale1.dtype not in allowed:
        return f"npu_ffn does not take scales {deq_scale1.dtype} and {deq_scale2.dtype} for {output_dtype}"
    return None


@register_kernel("ffn", "npu", devices=("npu",), declines=_declines)
def ffn(
    x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, *, inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None, **tensors: object,
) -> Tensor:  # fmt: skip
    """Forward; `expert_tokens` is a list of sizes on the host, as the kernel wants it."""
    options = {"inner_precise": inner_precise, "output_dtype": output_dtype if x.dtype == torch.int8 else None}
    given = {name: value for name, value in (tensors | options).items() if value is not None}
    return torch_npu.npu_ffn(x, weight1, weight2, activation, **given)
