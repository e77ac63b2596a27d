"""Grouped weight-gradient accumulation in Triton: each tile loads the sum so far, adds its product and stores."""

from __future__ import annotations

from torch import Tensor

from mindspeed.ops.kernels.triton._grouped import grouped_weight_gradient
from mindspeed.ops.kernels.triton._launch import triton_body


@triton_body("groupmatmul_add_")
def groupmatmul_add_(x: Tensor, dy: Tensor, group_list: Tensor, grad: Tensor) -> None:
    """`grad_g += x_g^T @ dy_g`."""
    grouped_weight_gradient(x, dy, group_list, grad, accumulate=True)
