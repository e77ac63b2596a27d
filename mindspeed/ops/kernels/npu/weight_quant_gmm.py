"""Grouped multiplication with int8 weights through `npu_grouped_matmul`."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._grouped import beyond_limits, by_rows


@register_kernel(
    "weight_quant_gmm",
    "npu",
    devices=("npu",),
    declines=lambda x, weight, scale, offset, bias, groups, *_: beyond_limits(
        "npu_grouped_matmul", x, groups, x.shape[1], weight.shape[2]
    ),
)
def weight_quant_gmm(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor | None, bias: Tensor | None,
    group_list: Tensor, group_list_type: int,
) -> Tensor:  # fmt: skip
    """Forward; the kernel wants an offset in any case."""
    offset = torch.zeros_like(antiquant_scale) if antiquant_offset is None else antiquant_offset
    return by_rows(
        x, weight, group_list, group_list_type, bias, antiquant_scale=[antiquant_scale.contiguous()],
        antiquant_offset=[offset.contiguous()],
    )  # fmt: skip
