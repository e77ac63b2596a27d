"""Bodies on aten's own CUDA kernels: what can be seen without a GPU, and numbers on one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mindspeed.ops import _gmm, backends, npu_matmul_add
from mindspeed.ops._random import draw
from mindspeed.ops.gmm import npu_gmm
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def operands(dtype, grad_dtype=FP32):
    return torch.randn(12, 24).to(dtype), torch.randn(12, 16).to(dtype), torch.randn(16, 24).to(grad_dtype)


def test_matmul_add_gives_cublas_the_accumulator_as_input_and_output(monkeypatch):
    calls = []

    class Addmm:
        @staticmethod
        def overloads():
            return ["dtype_out"]

        @staticmethod
        def dtype_out(bias, left, right, dtype, *, out):
            calls.append((bias is out, dtype))
            out.add_(left.float() @ right.float())

    x, dy, grad = operands(BF16)
    expected = grad + dy.float().t() @ x.float()
    monkeypatch.setattr(
        npu_matmul_add, "torch", SimpleNamespace(ops=SimpleNamespace(aten=SimpleNamespace(addmm=Addmm)), float32=FP32)
    )
    assert npu_matmul_add._no_wide_addmm(x, dy, grad) is None
    npu_matmul_add._wide_addmm(x, dy, grad)
    assert calls == [(True, FP32)]
    torch.testing.assert_close(grad, expected)


def test_matmul_add_leaves_other_dtypes_to_the_next_kernel():
    assert "not torch.float32 into torch.float32" in npu_matmul_add._no_wide_addmm(*operands(FP32))
    assert "not torch.float16 into torch.float16" in npu_matmul_add._no_wide_addmm(*operands(FP16, FP16))
    assert "dtype_out" in torch.ops.aten.addmm.overloads()


def test_grouped_products_leave_what_vector_loads_cannot_read_to_the_next_kernel():
    x, weight = torch.randn(16, 24).to(BF16), torch.randn(2, 24, 8).to(BF16)
    transposed = torch.randn(2, 8, 24).to(BF16).transpose(1, 2)
    for fitting in (x, torch.randn(24, 16).to(BF16).t(), torch.randn(16, 32).to(BF16)[:, :24]):
        assert _gmm._no_grouped_mm(fitting, weight) is _gmm._no_grouped_mm(fitting, transposed) is None
    shifted = torch.randn(16 * 24 + 1).to(BF16)[1:].view(16, 24)
    for unfitting in (torch.randn(16, 25).to(BF16)[:, :24], torch.randn(16, 48).to(BF16)[:, ::2], shifted):
        assert "multiples of 16 bytes" in _gmm._no_grouped_mm(unfitting, weight)


@pytest.mark.parametrize(("seed", "signed"), [(5, 5), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)])
def test_random_state_of_a_device_keeps_all_seeds_and_moves_the_offset_on(monkeypatch, seed, signed):
    state = {"offset": 8}
    generator = SimpleNamespace(
        initial_seed=lambda: seed, get_offset=lambda: state["offset"], set_offset=lambda value: state.update(offset=value)
    )
    module = SimpleNamespace(current_device=lambda: 0, default_generators=[generator])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert draw(torch.device("cuda"), 9).tolist() == [signed, 8]
    assert state["offset"] == 20  # rounded up to a multiple of four


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gpu_matmul_add_writes_in_place(dtype):
    x, dy, grad = (value.cuda() for value in operands(dtype))
    expected, place = grad.double() + 2 * (dy.double().t() @ x.double()), grad.data_ptr()
    with backends("matmul_add=aten"):
        npu_matmul_add_fp32(x, dy, grad)
        npu_matmul_add_fp32(x, dy, grad)
    assert grad.data_ptr() == place
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("ends", [[32, 32, 64], [0, 32, 64], [32, 64, 64], [16, 40, 48]], ids=str)
def test_gpu_grouped_products_of_aten_with_empty_groups_and_rows_after_the_last(ends):
    x = torch.randn(64, 32, device="cuda").to(BF16).requires_grad_()
    weight = torch.randn(3, 32, 48, device="cuda").to(BF16).requires_grad_()
    dy = torch.randn(64, 48, device="cuda").to(BF16)
    found = {}
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    try:
        for body in ("aten", "ref"):
            with backends(f"gmm={body}"):
                y = npu_gmm(x, weight, group_list=torch.tensor(ends, device="cuda"))
                found[body] = [y, *torch.autograd.grad(y, (x, weight), dy)]
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, truth in zip(found["aten"], found["ref"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-2, atol=2e-2)
