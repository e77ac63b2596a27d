"""AdamW step and moving average of the parameters in one pass over memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops._transfer import to_device
from mindspeed.ops.kernels.triton._launch import Build, triton_body

BLOCK = 1024


@triton.jit
def _correction(step, log_beta_high, log_beta_low):
    """`1 - beta^step` in float64: in float32 the difference of two numbers close to 1 would lose four digits."""
    exponent = step.to(tl.float64) * (tl.cast(log_beta_high, tl.float64) + tl.cast(log_beta_low, tl.float64))
    return (1.0 - tl.exp(exponent)).to(tl.float32)


@triton.jit(do_not_specialize=["lr"])
def _step(
    grad_ptr, var_ptr, m_ptr, v_ptr, s_ptr, step_ptr, count, lr, keep, beta1, beta2, rest1, rest2, rest_s,
    log1_high, log1_low, log2_high, log2_low, eps, decay,
    DECOUPLED: tl.constexpr, CORRECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    g = tl.load(grad_ptr + index, mask=inside, other=0.0)
    var = tl.load(var_ptr + index, mask=inside, other=0.0)
    if not DECOUPLED:
        g += decay * var
    m = beta1 * tl.load(m_ptr + index, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(v_ptr + index, mask=inside, other=0.0) + rest2 * g * g
    tl.store(m_ptr + index, m, mask=inside)
    tl.store(v_ptr + index, v, mask=inside)
    if CORRECT:
        step = tl.load(step_ptr)
        m = m / _correction(step, log1_high, log1_low)
        v = v / _correction(step, log2_high, log2_low)
    update = m / (tl.sqrt(v) + eps)
    if DECOUPLED:
        update += decay * var
    var -= lr * update
    tl.store(var_ptr + index, var, mask=inside)
    s = keep * tl.load(s_ptr + index, mask=inside, other=0.0) + rest_s * var
    tl.store(s_ptr + index, s, mask=inside)


def _two_floats(value: float) -> tuple[float, float]:
    """A float64 as two numbers that survive being passed as float32."""
    mantissa, exponent = math.frexp(value)
    high = math.ldexp(round(mantissa * 2**20) / 2**20, exponent)
    return high, value - high


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -1e9  # any power of 0 is 0


def _declines(grad: Tensor, var: Tensor, m: Tensor, v: Tensor, s: Tensor, *_: object) -> str | None:
    contiguous = all(value.is_contiguous() for value in (grad, var, m, v, s))
    return None if contiguous else "the tensors are not contiguous"


@triton_body("ema_adamw_", npu=True, first=True, declines=_declines)
def ema_adamw_(
    grad: Tensor, var: Tensor, m: Tensor, v: Tensor, s: Tensor, step: Tensor, lr: float, ema_decay: float,
    beta1: float, beta2: float, eps: float, decay_mode: int, bias_correction: bool, weight_decay: float,
) -> None:  # fmt: skip
    """Update var, m, v and s in place."""
    count = var.numel()
    _step[(triton.cdiv(count, BLOCK),)](
        grad, var, m, v, s, to_device(step, var.device), count, lr, ema_decay, beta1, beta2, 1.0 - beta1, 1.0 - beta2, 1.0 - ema_decay,
        *_two_floats(_log(beta1)), *_two_floats(_log(beta2)), eps, weight_decay,
        DECOUPLED=decay_mode == 1, CORRECT=bias_correction, BLOCK=BLOCK,
    )  # fmt: skip


_TYPES = "*fp32 *fp32 *fp32 *fp32 *fp32 *i64 i64" + " fp32" * 13
BUILDS = (Build(_step, _TYPES, {"DECOUPLED": True, "CORRECT": True, "BLOCK": BLOCK}),)
