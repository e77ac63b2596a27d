"""AdamW or Adam with a moving average of the parameters: torch_npu's fused AdamW, then one interpolation.

torch_npu has no `_fused_adam_` (it copies everything to the CPU and back), but Adam is AdamW without decay, on a gradient to
which the decay was added.
"""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401 - registers the kernel
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take

DECOUPLED = 1
"""Value of `mode` with which the decay does not pass through the moments."""


def _declines(
    grad: Tensor, var: Tensor, m: Tensor, v: Tensor, s: Tensor, step: Tensor, lr: float, ema_decay: float, beta1: float,
    beta2: float, eps: float, mode: int, bias_correction: bool, weight_decay: float,
) -> str | None:  # fmt: skip
    if not bias_correction:
        return "the fused kernel always corrects the bias"
    if not all(value.is_contiguous() for value in (grad, var, m, v, s)):
        return "the fused kernel wants contiguous tensors"
    return cannot_take("_fused_adamw_", var)


@register_kernel("ema_adamw_", "npu", devices=("npu",), declines=_declines)
def ema_adamw_(
    grad: Tensor, var: Tensor, m: Tensor, v: Tensor, s: Tensor, step: Tensor, lr: float, ema_decay: float, beta1: float,
    beta2: float, eps: float, mode: int, bias_correction: bool, weight_decay: float,
) -> None:  # fmt: skip
    """One step in place."""
    if mode != DECOUPLED:
        grad, weight_decay = grad.add(var, alpha=weight_decay) if weight_decay else grad, 0.0
    torch._fused_adamw_(
        [var], [grad], [m], [v], [], [step.reshape(()).to(var.device, torch.float32)],
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    s.lerp_(var, 1.0 - ema_decay)
