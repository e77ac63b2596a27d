"""Grouped multiplication with int8 weights in Triton."""

from __future__ import annotations

from torch import Tensor

from mindspeed.ops._groups import ends_of
from mindspeed.ops.kernels.triton._grouped_int8 import grouped_multiply_int8_weight
from mindspeed.ops.kernels.triton._launch import triton_body


@triton_body("weight_quant_gmm")
def weight_quant_gmm(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor | None, bias: Tensor | None,
    group_list: Tensor, group_list_type: int,
) -> Tensor:  # fmt: skip
    """Forward."""
    ends = ends_of(group_list, group_list_type)
    return grouped_multiply_int8_weight(x, weight, antiquant_scale, antiquant_offset, bias, ends)
