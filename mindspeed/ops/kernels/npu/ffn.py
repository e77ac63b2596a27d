"""Feed-forward network through `npu_ffn`."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.ffn import GATED

INNER_LIMIT = 65536


def _declines(
    x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, *, inner_precise: int | None = None, **_: object
) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.int8):
        return f"npu_ffn takes 16-bit and int8 input only, not {x.dtype}"
    if activation in GATED and not (x.dtype == weight1.dtype == torch.float16 and inner_precise == 1):
        return f"npu_ffn has {activation} for float16 with inner_precise=1 only"
    if x.dtype == torch.bfloat16 and weight1.dtype == x.dtype and inner_precise == 1:
        return "npu_ffn has inner_precise=1 for float16 only"
    sizes = weight1.shape[-2], weight2.shape[-2]
    return f"inner sizes {sizes} are beyond the limits of npu_ffn" if max(sizes) >= INNER_LIMIT else None


@register_kernel("ffn", "npu", devices=("npu",), declines=_declines)
def ffn(
    x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, *, inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None, **tensors: object,
) -> Tensor:  # fmt: skip
    """Forward; `expert_tokens` is a list of sizes on the host, as the kernel wants it."""
    options = {"inner_precise": inner_precise, "output_dtype": output_dtype if x.dtype == torch.int8 else None}
    given = {name: value for name, value in (tensors | options).items() if value is not None}
    return torch_npu.npu_ffn(x, weight1, weight2, activation, **given)
