"""Weight-gradient accumulation: the ATB library's fused product if it is installed, else one group of the grouped form."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._grouped import cannot_accumulate


@functools.cache
def atb_product() -> Callable | None:
    """`torch.ops.atb._npu_matmul_add_fp32` if torch_npu and the ATB library on this machine have it, else None."""
    try:
        from torch_npu.op_plugin.atb._atb_ops import _register_atb_extensions

        _register_atb_extensions()
    except (ImportError, OSError, RuntimeError):  # the library is an optional part of the vendor's stack
        return None
    return getattr(torch.ops.atb, "_npu_matmul_add_fp32", None)


@register_kernel("matmul_add_", "npu", devices=("npu",), declines=lambda x, dy, grad: cannot_accumulate(x, dy, 1, grad))
def matmul_add_(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """`grad += grad_output^T @ total_input` for 16-bit operands and float32 grad."""
    if (product := atb_product()) is not None:
        product(grad_output, total_input, grad)
        return
    end = torch.full((1,), total_input.shape[0], dtype=torch.int64, device=grad.device)
    torch_npu.npu_grouped_matmul_add_(grad.unsqueeze(0), grad_output, total_input, end)
