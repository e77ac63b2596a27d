"""Grouped weight-gradient accumulation through `npu_grouped_matmul_add_`."""

from __future__ import annotations

import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._grouped import cannot_accumulate


@register_kernel(
    "groupmatmul_add_",
    "npu",
    devices=("npu",),
    declines=lambda x, dy, groups, grad: cannot_accumulate(x, dy, groups.numel(), grad),
)
def groupmatmul_add_(x: Tensor, dy: Tensor, group_list: Tensor, grad: Tensor) -> None:
    """`grad_g += x_g^T @ dy_g`; group_list holds cumulative ends."""
    torch_npu.npu_grouped_matmul_add_(grad, x, dy, group_list)
