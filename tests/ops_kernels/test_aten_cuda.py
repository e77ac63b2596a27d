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
        def dtype_out(bias, left, right, dtype, *, out):
            calls.append((bias is out, dtype))
            out.add_(left.float() @ right.float())

    x, dy, grad = operands(BF16)
    expected = grad + dy.float().t() @ x.float()
    assert npu_matmul_add._no_wide_addmm(x, dy, grad) is None
    monkeypatch.setattr(
        npu_matmul_add, "torch", SimpleNamespace(ops=SimpleNamespace(aten=SimpleNamespace(addmm=Addmm)), float32=FP32)
    )
    npu_matmul_add._wide_addmm(x, dy, grad)
    assert calls == [(True, FP32)]
    torch.testing.assert_close(grad, expected)


def test_matmul_add_leaves_other_dtypes_to_the_next_kernel():
    assert "not torch.float32 into torch.float32" in npu_matmul_add._no_wide_addmm(*operands(FP32))
    assert "not torch.float16 into torch.float16" in npu_matmul_add._no_wide_addmm(*operands(FP16, FP16))
    assert "dtype_out" in torch.ops.aten.addmm.overloads()


@pytest.mark.parametrize(
    ("version", "serves"), [("2.7.1+cu126", False), ("2.9.1", False), ("2.10.0", True), ("2.13.0+cu130", True)]
)
def test_matmul_add_of_torch_refuses_a_float32_sum_before_2_10(monkeypatch, version, serves):
    monkeypatch.setattr(torch, "__version__", version)
    assert (npu_matmul_add._no_wide_addmm(*operands(BF16)) is None) == serves


HOPPER = (9, 0)
X, WEIGHT = torch.empty(7, 24, dtype=BF16), torch.empty(2, 24, 8, dtype=BF16)
ROWS, OTHER_ROWS = torch.empty(24, 7, dtype=BF16), torch.empty(7, 8, dtype=BF16)  # of group type 2


@pytest.mark.parametrize(
    ("x", "weight", "groups", "capability", "reason"),
    [
        (X, WEIGHT, 2, HOPPER, None),
        (X, WEIGHT, 2, (10, 0), None),
        (ROWS, OTHER_ROWS, 5, HOPPER, None),  # the number of rows that the groups cut may be odd
        (X, WEIGHT, 2, (8, 0), "waits for the host"),
        (X, WEIGHT, 2, (12, 0), "waits for the host"),
        (X.half(), WEIGHT.half(), 2, HOPPER, "bfloat16 only"),
        (X[:, :6], WEIGHT[:, :6], 2, HOPPER, "multiples of 8"),
        (X, WEIGHT[..., :7], 2, HOPPER, "multiples of 8"),
        (ROWS[:23], OTHER_ROWS, 2, HOPPER, "multiples of 8"),
        (ROWS, OTHER_ROWS[:, :7], 2, HOPPER, "multiples of 8"),
        (X, WEIGHT[:0], 0, HOPPER, "at least one group"),
        (ROWS, OTHER_ROWS, 1024, HOPPER, "up to 1023 groups"),
    ],
)
def test_what_the_grouped_product_of_aten_serves(x, weight, groups, capability, reason):
    found = _gmm._no_grouped_mm(x, weight, groups, capability)
    assert found is None if reason is None else reason in found


def _shifted(*shape):
    """Starts two bytes after an aligned place."""
    return torch.empty(torch.Size(shape).numel() + 1, dtype=BF16)[1:].view(shape)


LAYOUTS = [
    # tensor, whether any layout will do, whether rows are contiguous, whether columns are
    ("rows", torch.empty(16, 24, dtype=BF16), True, True, False),
    ("columns", torch.empty(24, 16, dtype=BF16).t(), True, False, True),
    ("wider rows", torch.empty(16, 32, dtype=BF16)[:, :24], True, True, False),
    ("rows with odd steps", torch.empty(16, 25, dtype=BF16)[:, :24], False, False, False),
    ("every second column", torch.empty(16, 48, dtype=BF16)[:, ::2], False, False, False),
    ("odd address", _shifted(16, 24), False, False, False),
    ("odd address, columns", _shifted(24, 16).t(), False, False, False),
    ("bytes of another dtype", torch.empty(16 * 48 + 8, dtype=torch.uint8)[8:].view(BF16).view(16, 24), False, False, False),
    ("repeated row", torch.empty(1, 24, dtype=BF16).expand(16, 24), False, False, False),
    ("repeated number", torch.empty(1, 1, dtype=BF16).expand(16, 24), False, False, False),
    ("one row", torch.empty(1, 24, dtype=BF16), True, True, False),
    ("one row of steps 1", torch.empty(24, dtype=BF16).as_strided((1, 24), (1, 1)), False, False, False),
    ("one column of rows", torch.empty(24, 1, dtype=BF16).as_strided((24, 1), (1, 24)), True, False, True),
    ("groups", torch.empty(3, 16, 24, dtype=BF16), True, True, False),
    ("transposed groups", torch.empty(3, 24, 16, dtype=BF16).transpose(1, 2), True, False, True),
    ("groups with odd steps", torch.empty(3, 16 * 24 + 1, dtype=BF16)[:, :-1].unflatten(1, (16, 24)), False, False, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "either", "rows", "columns"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS]
)
def test_what_descriptors_cannot_read_is_copied(value, either, rows, columns):
    for wanted, expected in ((None, either), (-1, rows), (-2, columns)):
        assert _gmm.is_laid_out(value, wanted) is expected
        assert (_gmm.laid_out(value, wanted) is value) is expected


@pytest.mark.parametrize("layout", [case[0] for case in LAYOUTS if case[1].dim() == 2 and case[1].shape[0] == 16])
def test_copies_hold_the_same_numbers(layout):
    (value,) = (case[1] for case in LAYOUTS if case[0] == layout)
    numbers = torch.randn(value.shape).to(BF16)
    given = numbers if 0 in value.stride() else value.copy_(numbers)
    for wanted in (None, -1, -2):
        copy = _gmm.laid_out(given, wanted)
        assert _gmm.is_laid_out(copy, wanted) and torch.equal(copy, numbers)


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
