"""Grouped weight-gradient accumulation through `npu_grouped_matmul_add_`."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import lacks


def declines(x: Tensor, grad: Tensor) -> str | None:
    """Reason why `npu_grouped_matmul_add_` cannot add a product of x to grad, else None."""
    if x.dtype not in (torch.float16, torch.bfloat16) or grad.dtype != torch.float32:
        return f"npu_grouped_matmul_add_ adds 16-bit products to float32, not {x.dtype} to {grad.dtype}"
    return lacks("npu_grouped_matmul_add_")


@register_kernel("groupmatmul_add_", "npu", devices=("npu",), declines=lambda x, dy, groups, grad: declines(x, grad))
def groupmatmul_add_(x: Tensor, dy: Tensor, group_list: Tensor, grad: Tensor) -> None:
    """`grad_g += x_g^T @ dy_g`; group_list holds cumulative ends."""
    torch_npu.npu_grouped_matmul_add_(grad, x, dy, group_list)
