"""EMA-AdamW in Triton, under the interpreter, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.triton_interpreter import triton_interpreter


@triton_interpreter("ema_adamw=triton")
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("mode", [0, 1])
def test_ema_adamw(mode, bias_correction):
    from mindspeed.ops import backend_report
    from mindspeed.ops.npu_apply_fused_ema_adamw import _reference, npu_apply_fused_ema_adamw

    grad, var, m = (torch.randn(37, 41) for _ in range(3))
    v, s = torch.rand(37, 41), torch.randn(37, 41)
    exact = [value.double() for value in (grad, var, m, v, s)]
    for number in (1, 2, 1000):
        step = torch.tensor([number])
        npu_apply_fused_ema_adamw(grad, var, m, v, s, step, 1e-2, 0.99, 0.9, 0.999, 1e-8, mode, bias_correction, 0.1)
        _reference(*exact, step, 1e-2, 0.99, 0.9, 0.999, 1e-8, mode, bias_correction, 0.1)
    assert backend_report(torch.get_default_device().type)["ema_adamw_"].kernel == "triton"
    for ours, truth in zip((var, m, v, s), exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=2e-6)


@triton_interpreter("ema_adamw=triton")
def test_beta_of_zero():
    from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw

    grad, var, m, v, s = (torch.ones(5) for _ in range(5))
    npu_apply_fused_ema_adamw(grad, var, m, v, s, torch.tensor([1]), 0.1, 0.0, 0.0, 0.0, 0.0)
    torch.testing.assert_close(var, torch.full((5,), 0.9))
    torch.testing.assert_close(s, var)
