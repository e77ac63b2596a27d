import pytest
import torch

from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16, npu_matmul_add_fp32
from mindspeed.testing.operators import check_operator, operator_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(7,), (3, 5), (1,), (600,)])
def test_adds_the_exact_product(dtype, lead):
    x, dy = torch.randn(*lead, 20).to(dtype), torch.randn(*lead, 12).to(dtype)
    grad = torch.randn(12, 20)
    exact = grad.double() + dy.flatten(0, -2).double().t() @ x.flatten(0, -2).double()
    assert npu_matmul_add_fp32(x, dy, grad) is None
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-4)


def test_sixteen_bit_target_is_rounded_once():
    x, dy, grad = torch.randn(9, 6).half(), torch.randn(9, 4).half(), torch.randn(4, 6).half()
    exact = (grad.float() + dy.float().t() @ x.float()).half()
    npu_matmul_add_fp16(x, dy, grad)
    assert torch.equal(grad, exact)


def test_many_micro_batches_beat_the_rounded_product():
    exact, fused, rounded = torch.zeros(8, 16, dtype=torch.float64), torch.zeros(8, 16), torch.zeros(8, 16)
    for _ in range(100):
        x, dy = torch.randn(32, 16).bfloat16(), torch.randn(32, 8).bfloat16()
        exact += dy.double().t() @ x.double()
        npu_matmul_add_fp32(x, dy, fused)
        rounded += dy.t() @ x
    assert (fused - exact).abs().max() < 0.01 * (rounded - exact).abs().max()


def test_allocates_nothing_of_weight_size():
    x, dy, grad = torch.randn(4, 300).bfloat16(), torch.randn(4, 200).bfloat16(), torch.zeros(200, 300)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != grad.data_ptr():
                self.seen = max(self.seen, result.numel())
            return result

    with Largest() as largest:
        from mindspeed.ops import npu_matmul_add as module

        module._reference(x, dy, grad)
    assert 0 < largest.seen <= x.numel()


@pytest.mark.parametrize("shape", [(0, 3, 2), (5, 0, 2), (5, 3, 0)])
def test_empty_operands_change_nothing(shape):
    t, k, n = shape
    grad = torch.ones(n, k)
    npu_matmul_add_fp32(torch.randn(t, k), torch.randn(t, n), grad)
    assert torch.equal(grad, torch.ones(n, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[3, 4, 5], [0, 12, 0], [4, 0, 8], [0, 0, 0], [2, 1, 3]])
@pytest.mark.parametrize("shape", [(3, 8, 6), (8, 18), (24, 6)])
def test_grouped_form(dtype, sizes, shape):
    x, dy = torch.randn(12, 8).to(dtype), torch.randn(12, 6).to(dtype)
    before = torch.randn(shape)
    results = []
    ends = torch.tensor(sizes).cumsum(0)
    for groups in (ends, ends.tolist()):
        grad = before.clone()
        npu_groupmatmul_add_fp32(x, dy, groups, grad)
        results.append(grad.view(3, 8, 6))
    parts = [x[rows].double().t() @ dy[rows].double() for rows in torch.arange(sum(sizes)).split(sizes)]
    expected = before.view(3, 8, 6).double() + torch.stack(parts)
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(*results)


def test_operators_are_well_formed():
    x, dy, grad = torch.randn(12, 8).bfloat16(), torch.randn(12, 6).bfloat16(), torch.randn(6, 8)
    check_operator(torch.ops.mindspeed.matmul_add_.default, (x, dy, grad), (x[:0], dy[:0], grad))
    check_operator(torch.ops.mindspeed.groupmatmul_add_.default, (x, dy, torch.tensor([3, 7, 12]), torch.randn(3, 8, 6)))
    assert operator_calls(lambda: npu_matmul_add_fp32(x, dy, grad)) == {"matmul_add_": 1}


def test_compiled_code_sees_the_mutation():
    def step(x, dy):
        grad = torch.zeros(dy.shape[1], x.shape[1])
        npu_matmul_add_fp32(x, dy, grad)
        return grad + 1

    x, dy = torch.randn(5, 3), torch.randn(5, 2)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(x, dy), dy.t() @ x + 1)


@pytest.mark.parametrize(
    ("x", "dy", "grad", "error", "text"),
    [
        (torch.ones(4, 3), torch.ones(4, 2).half(), torch.ones(2, 3), TypeError, "grad_output must have dtype float32"),
        (torch.ones(4, 3), torch.ones(5, 2), torch.ones(2, 3), ValueError, r"grad_output must have shape \(4, 2\)"),
        (torch.ones(4, 3), torch.ones(4, 2), torch.ones(3, 2), ValueError, r"grad must have shape \(2, 3\)"),
        (torch.ones(4, 3), torch.ones(4, 2), torch.ones(3, 2).t(), ValueError, "grad must be contiguous, got strides"),
        (torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 3, requires_grad=True), ValueError, "grad must not require grad"),
        (torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 3).half(), TypeError, "grad must have dtype float32, got float16"),
        (torch.ones(4), torch.ones(4), torch.ones(4, 4), ValueError, "total_input must have at least 2 dimensions"),
    ],
)
def test_errors(x, dy, grad, error, text):
    with pytest.raises(error, match=f"npu_matmul_add_fp32: {text}"):
        npu_matmul_add_fp32(x, dy, grad)


def test_errors_of_the_grouped_form():
    x, dy = torch.ones(4, 3), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"grad must have G\*K\*N = 12 elements, got shape \(3, 2\)"):
        npu_groupmatmul_add_fp32(x, dy, [2, 4], torch.ones(3, 2))
    with pytest.raises(ValueError, match="grad must be contiguous"):
        npu_groupmatmul_add_fp32(x, dy, [4], torch.ones(2, 3).t())
    with pytest.raises(ValueError, match="grouplist must not count more than the 4 rows"):
        npu_groupmatmul_add_fp32(x, dy, torch.tensor([2, 5]), torch.ones(2, 3, 2))
    with pytest.raises(TypeError, match="grouplist must have dtype int64, got int32"):
        npu_groupmatmul_add_fp32(x, dy, torch.tensor([4], dtype=torch.int32), torch.ones(1, 3, 2))
