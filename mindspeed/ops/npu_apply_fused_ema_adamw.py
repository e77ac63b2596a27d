"""One AdamW step on one tensor in place, together with the moving average of the parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._registry import define, register_kernel
from mindspeed.ops._transfer import to_device

OP = "npu_apply_fused_ema_adamw"


def npu_apply_fused_ema_adamw(
    grad: Tensor,
    var: Tensor,
    m: Tensor,
    v: Tensor,
    s: Tensor,
    step: Tensor,
    lr: float = 1e-3,
    ema_decay: float = 0.9999,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    mode: int = 1,
    bias_correction: bool = True,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update var, both moments and the average `s` in place; returns `(var, m, v, s)`, the same tensors.

    All tensors have the shape of var and dtype float32; step: int64 tensor of one element, the number of this step. mode 1:
    AdamW (decoupled decay), mode 0: Adam with the decay added to the gradient. `s = ema_decay * s + (1 - ema_decay) * var`.
    """
    _checks.tensor(OP, "var", var, (torch.float32, torch.float64))
    for name, value in (("grad", grad), ("m", m), ("v", v), ("s", s)):
        _checks.tensor(OP, name, value, (var.dtype,))
        _checks.shape(OP, name, value, var.shape)
    _checks.tensor(OP, "step", step, (torch.int64,))
    _checks.require(OP, "step", step.numel() == 1, "must have one element", tuple(step.shape))
    _checks.near(OP, "step", step, var.device)
    _checks.same_device(OP, var=var, grad=grad, m=m, v=v, s=s)
    _checks.option(OP, "mode", mode, (0, 1))
    _checks.require(OP, "ema_decay", 0.0 <= ema_decay <= 1.0, "must lie in [0, 1]", ema_decay)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        _checks.require(OP, name, 0.0 <= beta < 1.0, "must lie in [0, 1)", beta)
    with torch.no_grad():
        torch.ops.mindspeed.ema_adamw_(
            grad, var, m, v, s, step, lr, ema_decay, beta1, beta2, eps, mode, bias_correction, weight_decay
        )
    return var, m, v, s


class Options(NamedTuple):
    """The numbers of the operator in the order of its schema."""

    lr: float
    ema_decay: float
    beta1: float
    beta2: float
    eps: float
    mode: int
    bias_correction: bool
    weight_decay: float


def _reference(grad: Tensor, var: Tensor, m: Tensor, v: Tensor, s: Tensor, step: Tensor, *numbers: float) -> None:
    options = Options(*numbers)
    g = grad if options.mode == 1 else grad + options.weight_decay * var
    m.copy_(options.beta1 * m + (1 - options.beta1) * g)
    v.copy_(options.beta2 * v + (1 - options.beta2) * g * g)
    first = second = 1.0
    if options.bias_correction:
        count = to_device(step.reshape(()), var.device, var.dtype)
        first, second = 1 - options.beta1**count, 1 - options.beta2**count
    update = (m / first) / ((v / second).sqrt() + options.eps)
    var.sub_(options.lr * (update + options.weight_decay * var * options.mode))
    s.lerp_(var, 1.0 - options.ema_decay)


define(
    "ema_adamw_(Tensor grad, Tensor(a!) var, Tensor(b!) m, Tensor(c!) v, Tensor(d!) s, Tensor step, float lr, float ema_decay,"
    " float beta1, float beta2, float eps, int decay_mode, bool bias_correction, float weight_decay) -> ()",
    family="ema_adamw",
    reference=_reference,
    fake=lambda *_: None,
)


def _no_fused_kernel(grad: Tensor, var: Tensor, m: Tensor, v: Tensor, s: Tensor, step: Tensor, *numbers: float) -> str | None:
    if not Options(*numbers).bias_correction:
        return "torch's fused kernel always corrects the bias"
    if not all(value.is_contiguous() for value in (grad, var, m, v, s)):
        return "torch's fused kernel wants contiguous tensors"
    return None


@register_kernel("ema_adamw_", "aten", devices=("cpu", "cuda"), declines=_no_fused_kernel)
def _fused(grad: Tensor, var: Tensor, m: Tensor, v: Tensor, s: Tensor, step: Tensor, *numbers: float) -> None:
    """torch's fused kernel, then the average.

    Both on the whole tensor: doing it in blocks, so that `lerp_` finds var in the cache, was 3 to 15 % slower on a CPU.
    """
    lr, ema_decay, beta1, beta2, eps, mode, _, weight_decay = Options(*numbers)
    fused = torch._fused_adamw_ if mode == 1 else torch._fused_adam_
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
    count = to_device(step.reshape(()), var.device, torch.float32)
    fused([var], [grad], [m], [v], [], [count], **numbers, amsgrad=False, maximize=False)
    s.lerp_(var, 1.0 - ema_decay)
