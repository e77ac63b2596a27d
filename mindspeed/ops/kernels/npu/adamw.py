"""AdamW through `torch._fused_adamw_`, which torch_npu maps to its fused kernel for all mixes of 16- and 32-bit dtypes."""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401 - registers the kernel
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take


@register_kernel("adamw_", "npu", devices=("npu",), declines=lambda param, *_: cannot_take("_fused_adamw_", param))
def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, state_step: Tensor,
    lr: float, beta1: float, beta2: float, weight_decay: float, eps: float, amsgrad: bool, maximize: bool,
) -> None:  # fmt: skip
    """One step in place; the kernel counts steps from 0 and torch_npu subtracts the 1 itself."""
    torch._fused_adamw_(
        [param], [grad], [exp_avg], [exp_avg_sq], [max_exp_avg_sq] if amsgrad else [], [state_step.to(param.device)],
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=amsgrad, maximize=maximize,
    )  # fmt: skip
