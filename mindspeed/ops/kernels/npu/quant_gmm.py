"""Grouped multiplication of int8 operands through `npu_grouped_matmul`."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._grouped import beyond_limits, by_rows


@register_kernel(
    "quant_gmm",
    "npu",
    devices=("npu",),
    declines=lambda x, weight, scale, per_token_scale, bias, groups, *_: beyond_limits(
        "npu_grouped_matmul", x, groups, x.shape[1], weight.shape[2]
    ),
)
def quant_gmm(
    x: Tensor, weight: Tensor, scale: Tensor, per_token_scale: Tensor | None, bias: Tensor | None, group_list: Tensor,
    group_list_type: int, output_dtype: torch.dtype, act_type: int,
) -> Tensor:  # fmt: skip
    """Forward; the kernel wants one scale per column."""
    return by_rows(
        x, weight, group_list, group_list_type, bias, scale=[scale.expand(-1, weight.shape[2]).contiguous()],
        per_token_scale=None if per_token_scale is None else [per_token_scale], act_type=act_type, output_dtype=output_dtype,
    )  # fmt: skip
