"""Feed-forward network through `npu_ffn`."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel


def _declines(x: Tensor, *_: object, **__: object) -> str | None:
    return "npu_ffn takes 16-bit and int8 input only" if x.dtype == torch.float32 else None


@register_kernel("ffn", "npu", devices=("npu",), declines=_declines)
def ffn(
    x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, *, inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None, **tensors: object,
) -> Tensor:  # fmt: skip
    """Forward; `expert_tokens` is a list of sizes on the host, as the kernel wants it."""
    options = {"inner_precise": inner_precise, "output_dtype": output_dtype if x.dtype == torch.int8 else None}
    given = {name: value for name, value in (tensors | options).items() if value is not None}
    return torch_npu.npu_ffn(x, weight1, weight2, activation, **given)
