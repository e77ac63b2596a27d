"""The contract process itself: it records calls, reports failures, survives crashes and hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract, place, unavailable
from mindspeed.testing.shipped import Process, RemoteFailure


@npu_contract()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_are_recorded_with_names_dtypes_and_shapes(calls, dtype):
    a = torch.ones(4, 3, dtype=dtype, device="npu")
    b = torch.ones(3, 5, dtype=dtype, device="npu")
    assert calls.names == ["aclnnInplaceOne"] * 2
    calls.reset()
    assert calls.names == []
    product = a @ b
    (call,) = calls
    name = str(dtype).removeprefix("torch.")
    assert call.name == "aclnnMatmul"
    assert [(tensor.dtype, tensor.shape) for tensor in call.tensors] == [(name, (4, 3)), (name, (3, 5)), (name, (4, 5))]
    assert call.tensors[0].strides == (3, 1)
    assert (product.dtype, product.shape, product.device.type) == (dtype, (4, 5), "npu")


@npu_contract()
def test_memory_is_real_though_kernels_are_not(calls):
    values = torch.arange(6.0).view(2, 3)
    assert torch.equal(values.to("npu").cpu(), values)
    assert torch.npu.get_device_name() == "Ascend910B1"
    assert torch.npu.device_count() == 1


@npu_contract()
def test_integer_lists_are_recorded(calls):
    torch.zeros(2, 3, 4, device="npu").sum(dim=(0, 2))
    assert calls.named("aclnnReduceSum")[0].int_lists == ((0, 2),)


@npu_contract()
def test_autograd_thread_is_recorded_too(calls):
    x = torch.zeros(2, 3, device="npu", requires_grad=True)
    calls.reset()
    x.relu().sum().backward()
    assert "aclnnThresholdBackward" in calls.names
    assert x.grad.shape == (2, 3)


@npu_contract()
def test_older_compile_path_is_recorded(calls):
    import torch_npu

    var, m, v, grad = (torch.zeros(8, device="npu") for _ in range(4))
    calls.reset()
    torch_npu.npu_apply_adam_w(0.9, 0.99, 1e-3, 0.0, 0.9, 0.999, 1e-8, grad, None, False, False, out=(var, m, v))
    assert calls.names == ["ApplyAdamW"]


@npu_contract()
def test_single_rank_hccl_group(calls, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("hccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        tensor = torch.ones(4, device="npu")
        calls.reset()
        dist.all_reduce(tensor)
        torch.npu.synchronize()
        assert calls.names == ["HcclAllReduce"]
    finally:
        dist.destroy_process_group()


@npu_contract()
def test_compile_with_aot_eager(calls):
    double = torch.compile(lambda x: torch.relu(x) * 2, backend="aot_eager", fullgraph=True)
    x = torch.zeros(4, device="npu")
    calls.reset()
    assert double(x).shape == (4,)
    assert calls.names == ["aclnnRelu", "aclnnMuls"]


@npu_contract()
def test_atb_operators_are_readable(calls):
    from torch_npu.op_plugin.atb import _atb_ops

    _atb_ops._register_atb_extensions()
    schema = torch.ops.atb._npu_matmul_add_fp32.default._schema
    assert [argument.name for argument in schema.arguments] == ["x", "weight", "C"]


# ---- failures, seen from this side -------------------------------------------------------------------------------------------


def failing_body(calls):
    answer = 41
    assert answer == 42


def dying_body(calls):
    os._exit(7)


def hanging_body(calls):
    time.sleep(60)


def harmless_body(calls):
    assert calls.names == []


@pytest.fixture(scope="module")
def process():
    if reason := unavailable():
        pytest.skip(reason)
    process = Process(place())
    yield process
    process.close()


@pytest.mark.npu_contract
def test_failures_carry_the_remote_traceback_with_values(process):
    with pytest.raises(RemoteFailure, match=r"(?s)assert answer == 42.*answer = 41"):
        process.run(failing_body, {}, seconds=60)
    process.run(harmless_body, {}, seconds=60)


@pytest.mark.npu_contract
def test_a_crash_is_reported_and_the_next_test_gets_a_new_process(process):
    with pytest.raises(RemoteFailure, match="died with exit code 7"):
        process.run(dying_body, {}, seconds=60)
    process.run(harmless_body, {}, seconds=60)


@pytest.mark.npu_contract
def test_a_hang_is_ended_with_its_stacks(process):
    process.run(harmless_body, {}, seconds=60)
    with pytest.raises(RemoteFailure, match=r"(?s)no answer .* in 1 s.*in hanging_body"):
        process.run(hanging_body, {}, seconds=1)


def test_unloaded_torch_npu_needs_a_fresh_process():
    with pytest.raises(ValueError, match="load=False needs fresh=True"):
        npu_contract(load=False)
