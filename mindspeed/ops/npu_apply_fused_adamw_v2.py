"""One AdamW step on one tensor in place, with any mix of float dtypes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import row_blocks
from mindspeed.ops._registry import define, register_kernel
from mindspeed.ops._transfer import to_device

OP = "npu_apply_fused_adamw_v2"


def npu_apply_fused_adamw_v2(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    state_step: Tensor,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    amsgrad: bool = False,
    maximize: bool = False,
) -> None:
    """Update param, exp_avg, exp_avg_sq (and max_exp_avg_sq with amsgrad) in place.

    All tensors have the shape of param; exp_avg and exp_avg_sq have its dtype, grad and max_exp_avg_sq any of float32, float16,
    bfloat16. state_step: int64 or float32 tensor of one element, the number of this step (1 for the first). Computed in
    float32; 16-bit tensors are widened and rounded once. Source: Loshchilov and Hutter 2019, Reddi et al. 2018.
    """
    _checks.tensor(OP, "param", param)
    tensors = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if amsgrad or max_exp_avg_sq is not None:
        tensors["max_exp_avg_sq"] = max_exp_avg_sq
    for name, value in tensors.items():
        _checks.tensor(OP, name, value)
        _checks.shape(OP, name, value, param.shape)
    for name in ("exp_avg", "exp_avg_sq"):
        _checks.dtype_of(OP, name, tensors[name], param.dtype)
    _checks.tensor(OP, "state_step", state_step, (torch.int64, torch.float32))
    _checks.require(OP, "state_step", state_step.numel() == 1, "must have one element", tuple(state_step.shape))
    _checks.near(OP, "state_step", state_step, param.device)
    _checks.same_device(OP, param=param, **tensors)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        _checks.require(OP, name, 0.0 <= beta < 1.0, "must lie in [0, 1)", beta)
    with torch.no_grad():
        torch.ops.mindspeed.adamw_(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, state_step, lr, beta1, beta2, weight_decay, eps, amsgrad, maximize
        )


class Options(NamedTuple):
    """The numbers of the operator in the order of its schema, under the names of torch's fused kernel."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    amsgrad: bool
    maximize: bool


def _reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    state_step: Tensor,
    *numbers: float,
) -> None:
    options, wide = Options(*numbers), _checks.wide_dtype(param)
    step = to_device(state_step.reshape(()), param.device, wide)
    g = grad.to(wide)
    g = -g if options.maximize else g
    m, v = exp_avg.to(wide), exp_avg_sq.to(wide)
    m = m + (1 - options.beta1) * (g - m)
    v = options.beta2 * v + (1 - options.beta2) * g * g
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if options.amsgrad:
        v = torch.maximum(max_exp_avg_sq.to(wide), v)
        max_exp_avg_sq.copy_(v)
    denominator = v.sqrt() / (1 - options.beta2**step).sqrt() + options.eps
    decayed = param.to(wide) * (1 - options.lr * options.weight_decay)
    param.copy_(decayed - options.lr / (1 - options.beta1**step) * m / denominator)


define(
    "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq,"
    " Tensor state_step, float lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize) -> ()",
    family="adamw",
    reference=_reference,
    fake=lambda *_: None,
)


@register_kernel("adamw_", "aten", devices=("cpu", "cuda"))
def _fused(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    state_step: Tensor,
    *numbers: float,
) -> None:
    """torch's fused kernel; mixed or 16-bit dtypes go through float32 temporaries, a block at a time."""
    options, wide = Options(*numbers), _checks.wide_dtype(param)
    step = to_device(state_step.reshape(()), param.device, torch.float32)
    states = [param, grad, exp_avg, exp_avg_sq, *([max_exp_avg_sq] if options.amsgrad else [])]
    if all(state.dtype == wide and state.is_contiguous() for state in states):
        _update(step, options, *states)
        return
    if not all(state.is_contiguous() for state in states):
        blocks = [tuple(states)]
    else:
        flat = [state.view(-1) for state in states]
        blocks = [tuple(state[block] for state in flat) for block in row_blocks(param.numel(), 4)]
    for block in blocks:
        work = [state.to(wide, memory_format=torch.contiguous_format, copy=True) for state in block]
        _update(step, options, *work)
        for index, (state, value) in enumerate(zip(block, work, strict=True)):
            if index != 1:  # the gradient stays as it is
                state.copy_(value)


def _update(step: Tensor, options: Options, p: Tensor, g: Tensor, m: Tensor, v: Tensor, *top: Tensor) -> None:
    torch._fused_adamw_([p], [g], [m], [v], list(top), [step], **options._asdict())
