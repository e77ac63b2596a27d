"""Optimizer operators on the NPU: one fused kernel for every mix of dtypes."""

from __future__ import annotations

import itertools

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="npu")


@npu_contract()
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_is_one_kernel_for_all_mixes_of_dtypes(calls, amsgrad):
    from mindspeed.ops import backend_report
    from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2

    for state, grad, top in itertools.product(DTYPES, DTYPES, DTYPES if amsgrad else (None,)):
        param, m, v = (tensor(5, 7, dtype=state) for _ in range(3))
        largest = tensor(5, 7, dtype=top) if amsgrad else None
        step = torch.ones(1, dtype=torch.int64, device="npu")
        gradient = tensor(5, 7, dtype=grad)
        calls.reset()
        npu_apply_fused_adamw_v2(param, gradient, m, v, largest, step, amsgrad=amsgrad)
        assert calls.names == ["aclnnSubs", "aclnnApplyAdamWV2"]
        given = calls.named("aclnnApplyAdamWV2")[0].tensors
        dtypes = [argument.dtype for argument in (*given[:3], given[4 if amsgrad else 3])]
        assert dtypes == [str(dtype).removeprefix("torch.") for dtype in (state, state, state, grad)]
    assert backend_report("npu")["adamw_"].kernel == "npu"


@npu_contract()
@pytest.mark.parametrize("mode", [0, 1])
def test_ema_adamw_is_the_fused_step_and_one_interpolation(calls, mode):
    from mindspeed.ops import backend_report
    from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw

    state = [tensor(5, 7) for _ in range(5)]
    step = torch.ones(1, dtype=torch.int64, device="npu")
    calls.reset()
    returned = npu_apply_fused_ema_adamw(*state, step, mode=mode)
    assert [value.data_ptr() for value in returned] == [value.data_ptr() for value in state[1:]]
    assert calls.names == ["aclnnInplaceCopy", "aclnnSubs", "aclnnApplyAdamWV2", "aclnnInplaceLerps"]
    calls.reset()
    npu_apply_fused_ema_adamw(*state, step, mode=mode, weight_decay=0.1)
    decayed = [] if mode == 1 else ["aclnnAdd"]  # the decay passes through the moments
    assert calls.names == [*decayed, "aclnnInplaceCopy", "aclnnSubs", "aclnnApplyAdamWV2", "aclnnInplaceLerps"]
    assert backend_report("npu")["ema_adamw_"].kernel == "npu"
    npu_apply_fused_ema_adamw(*state, step, mode=mode, bias_correction=False)
    assert backend_report("npu")["ema_adamw_"] == ("npu", "ref", "the fused kernel always corrects the bias")
