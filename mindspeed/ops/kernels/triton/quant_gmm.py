"""Grouped multiplication of int8 operands in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._groups import ends_of
from mindspeed.ops._quantised import float_scale
from mindspeed.ops.kernels.triton._grouped_int8 import grouped_multiply_int8
from mindspeed.ops.kernels.triton._launch import triton_body


@triton_body("quant_gmm")
def quant_gmm(
    x: Tensor, weight: Tensor, scale: Tensor, per_token_scale: Tensor | None, bias: Tensor | None, group_list: Tensor,
    group_list_type: int, output_dtype: torch.dtype, act_type: int,
) -> Tensor:  # fmt: skip
    """Forward; scales arrive as float32 or as its bits."""
    columns = float_scale(scale).expand(-1, weight.shape[2])
    ends = ends_of(group_list, group_list_type)
    return grouped_multiply_int8(x, weight, columns, per_token_scale, bias, ends, output_dtype, act_type)
