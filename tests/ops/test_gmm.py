import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.gmm import GMMFunction, npu_gmm, npu_gmm_v2
from mindspeed.testing.operators import assert_compiles, assert_operator_accurate, check_operator, kept_bytes, operator_calls

GROUPS = [[3, 4, 5], [0, 7, 5], [4, 8, 0], [4, 4, 4], [0, 0, 0], [12, 0, 0], [2, 1, 3]]  # sizes; the last leaves rows over


def ends(sizes):
    return torch.tensor(sizes).cumsum(0)


def textbook(sizes):
    def form(x, weight, bias=None):
        parts, start = [], 0
        for index, size in enumerate(sizes):
            y = x[start : start + size] @ weight[index]
            parts.append(y if bias is None else y + bias[index])
            start += size
        parts.append(x.new_zeros(len(x) - start, weight.shape[2]))
        return torch.cat([part.to(x.dtype) for part in parts])

    return form


def inputs(dtype, rows=12, k=8, n=6, groups=3, bias=False, transposed=False):
    x = torch.randn(rows, k).to(dtype).requires_grad_()
    weight = torch.randn(groups, n, k).transpose(1, 2) if transposed else torch.randn(groups, k, n)
    weight = weight.to(dtype).detach().requires_grad_()
    if not bias:
        return x, weight
    bias_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    return x, weight, torch.randn(groups, n).to(bias_dtype).requires_grad_()


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(sizes, dtype, bias, transposed, body):
    arguments = inputs(dtype, bias=bias, transposed=transposed)
    run = lambda x, w, b=None: npu_gmm(x, w, bias=b, group_list=ends(sizes))  # noqa: E731
    with backends(f"gmm={body}"):
        assert_operator_accurate(run, textbook(sizes), *arguments)


@pytest.mark.parametrize("sizes", GROUPS)
def test_lists_and_tensors_of_ends_and_sizes_agree(sizes):
    x, weight = inputs(torch.float32)
    expected = textbook(sizes)(x, weight)
    for y in (
        npu_gmm(x, weight, group_list=ends(sizes)),
        npu_gmm(x, weight, group_list=ends(sizes).tolist()),
        npu_gmm_v2(x, weight, group_list=torch.tensor(sizes)),
        npu_gmm_v2(x, weight, group_list=sizes),
        torch.ops.mindspeed.npu_gmm(x, weight, group_list=ends(sizes)),
        torch.ops.mindspeed.npu_gmm(x, weight, group_list=ends(sizes).tolist()),
        torch.ops.mindspeed.npu_gmm_v2(x, weight, group_list=torch.tensor(sizes), group_type=0),
    ):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("sizes", GROUPS)
def test_group_type_2_multiplies_the_rows_of_a_group(sizes, body):
    x, dy = torch.randn(12, 4), torch.randn(12, 5)
    with backends(f"gmm={body}"):
        y = npu_gmm_v2(x.t(), dy, group_list=sizes, group_type=2)
    parts = [(x[rows].t() @ dy[rows]) for rows in torch.arange(sum(sizes)).split(sizes)]
    torch.testing.assert_close(y, torch.stack(parts))


def test_one_group_without_a_list():
    x, weight = inputs(torch.float32, groups=1)
    torch.testing.assert_close(npu_gmm(x, weight, group_type=-1), x @ weight[0])
    torch.testing.assert_close(npu_gmm(x, weight), x @ weight[0])


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_gradcheck(body):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (2, 3, 2), (2, 2)))
    with backends(f"gmm={body}"):
        torch.autograd.gradcheck(lambda x, w, b: npu_gmm(x, w, bias=b, group_list=[2, 4]), (x, weight, bias))


def test_gradient_of_a_transposed_weight_has_its_layout():
    x, weight = inputs(torch.float32, transposed=True)
    npu_gmm(x, weight, group_list=[4, 8, 12]).sum().backward()
    dweight = torch.ops.mindspeed.gmm_backward(torch.ones(12, 6), x, weight, ends([3, 4, 5]), 0, False, True, False)[1]
    assert dweight.stride() == weight.stride()


def test_no_rows_at_all():
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(3, 8, 6, requires_grad=True)
    y = npu_gmm(x, weight, group_list=[0, 0, 0])
    y.sum().backward()
    assert y.shape == (0, 6) and x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(3, 8, 6))


def test_operators_are_well_formed_and_trace():
    ops = torch.ops.mindspeed
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = inputs(dtype, bias=True)
        check_operator(
            ops.gmm.default,
            (x.detach(), weight.detach(), None, ends([3, 4, 5]), 0, 0),
            (x, weight, bias, torch.tensor([3, 4, 5]), 0, 1),
            (x.detach().t(), x.detach().clone(), None, ends([3, 4, 5]), 2, 0),
            (x.detach()[:0], weight.detach(), None, ends([0, 0, 0]), 0, 0),
        )
    x, weight, dy = x.detach(), weight.detach(), torch.randn(12, 6).to(dtype)
    check_operator(
        ops.gmm_backward.default,
        (dy, x, weight, ends([3, 4, 5]), 0, True, True, True),
        (dy, x, weight.transpose(1, 2).contiguous().transpose(1, 2), ends([3, 4, 5]), 0, False, True, False),
    )
    assert_compiles(lambda x, w, g: npu_gmm(x, w, group_list=g), *inputs(torch.float32), ends([3, 4, 5]))


def test_keeps_operands_and_the_list_and_calls_once_each_way():
    x, weight = inputs(torch.bfloat16)
    groups = ends([3, 4, 5])
    assert kept_bytes(lambda: npu_gmm(x, weight, group_list=groups)) == 2 * (x.numel() + weight.numel()) + 8 * 3
    calls = operator_calls(lambda: npu_gmm(x, weight, group_list=groups).sum().backward())
    assert calls == {"gmm": 1, "gmm_backward": 1}


class TestGemmFusion:
    """`gemm_fusion=True`: the weight gradient goes into float32 `main_grad`."""

    def weight(self, **marks):
        parameter = torch.nn.Parameter(torch.randn(3, 8, 6))
        parameter.main_grad = torch.ones(8, 18)  # Megatron keeps experts as [K, G*N]
        for name, value in marks.items():
            setattr(parameter, name, value)
        return parameter

    def run(self, original, groups, gemm=npu_gmm):
        x = torch.randn(12, 8, requires_grad=True)
        weight = original.view(3, 8, 6)
        weight.retain_grad()
        bias = torch.randn(3, 6, requires_grad=True)
        y = gemm(x, weight, bias=bias, group_list=groups, gemm_fusion=True, original_weight=original)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected = [x[rows].detach().t() @ dy[rows] for rows in (slice(0, 3), slice(3, 7), slice(7, 12))]
        torch.testing.assert_close(original.main_grad.view(3, 8, 6), 1 + torch.stack(expected))
        torch.testing.assert_close(x.grad[3:7], dy[3:7] @ weight[1].detach().t())
        torch.testing.assert_close(bias.grad[1], dy[3:7].sum(0))
        return weight.grad

    @pytest.mark.parametrize("groups", [[3, 7, 12], torch.tensor([3, 7, 12])])
    def test_main_grad_is_updated_and_a_dummy_returned(self, groups):
        original = self.weight(grad_added_to_main_grad=False, zero_out_wgrad=True)
        dummy = self.run(original, groups)
        assert torch.equal(dummy, torch.zeros(3, 8, 6))
        assert original.grad_added_to_main_grad is True

    def test_sizes(self):
        assert self.run(self.weight(grad_added_to_main_grad=False), [3, 4, 5], npu_gmm_v2).shape == (3, 8, 6)

    def test_no_dummy_without_the_mark(self):
        assert self.run(self.weight(), [3, 7, 12]) is None

    def test_errors(self):
        x, weight = inputs(torch.float32)
        with pytest.raises(ValueError, match="original_weight must have a main_grad with gemm_fusion=True, got None"):
            npu_gmm(x, weight, group_list=[3, 7, 12], gemm_fusion=True)
        with pytest.raises(ValueError, match="got a weight without it"):
            npu_gmm(x, weight, group_list=[3, 7, 12], gemm_fusion=True, original_weight=weight)


@pytest.mark.parametrize(
    ("main_grad", "error", "text"),
    [
        (torch.zeros(3, 8, 6).bfloat16(), TypeError, "must have dtype float32, got bfloat16"),
        (torch.zeros(6, 8, 3).transpose(0, 2), ValueError, "must be contiguous, got strides"),
        (torch.zeros(3, 8, 5), ValueError, r"must have 144 elements, got shape \(3, 8, 5\)"),
        (torch.zeros(3, 8, 6, device="meta"), RuntimeError, "must be on cpu like weight, got meta"),
    ],
)
def test_main_grad_is_checked_in_forward(main_grad, error, text):
    x, weight = inputs(torch.float32)
    original = torch.nn.Parameter(weight.detach())
    original.main_grad = main_grad
    with pytest.raises(error, match=f"npu_gmm: original_weight.main_grad {text}"):
        npu_gmm(x, weight, group_list=[3, 7, 12], gemm_fusion=True, original_weight=original)


def test_published_form_of_backward():
    x, weight = inputs(torch.float32)
    dy = torch.randn(12, 6)
    (dx,), (dweight,), rest = GMMFunction.builder.load().npu_gmm_backward([dy], [x], [weight], ends([3, 4, 5]), 0)
    expected = torch.autograd.grad(textbook([3, 4, 5])(x, weight), (x, weight), dy)
    torch.testing.assert_close((dx, dweight), expected)
    assert rest == []


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch.nn.functional.grouped_mm needs a newer torch")
@pytest.mark.parametrize("sizes", [[3, 4, 5], [0, 7, 5], [4, 8, 0], [2, 1, 3]])
@pytest.mark.parametrize("transposed", [False, True])
def test_body_on_grouped_mm_agrees_with_the_reference(sizes, transposed):
    from mindspeed.ops import _gmm as module

    x, weight, bias = (value.detach() for value in inputs(torch.bfloat16, n=16, bias=True, transposed=transposed))
    dy = torch.randn(12, 16).bfloat16()
    for arguments in (
        (x, weight, bias, ends(sizes), 0, 0),
        (x, weight, None, torch.tensor(sizes), 0, 1),
        (x.t(), dy, None, ends(sizes), 2, 0),
    ):
        torch.testing.assert_close(module._grouped_mm(*arguments), module._reference(*arguments), rtol=0.02, atol=0.02)
    arguments = (dy, x, weight, ends(sizes), 0, True, True, False)
    for value, expected in zip(module._grouped_mm_backward(*arguments), module._reference_backward(*arguments), strict=True):
        torch.testing.assert_close(value, expected)
        assert value.stride() == expected.stride()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"group_type": 1}, ValueError, "npu_gmm: group_type must be one of -1, 0, 2, got 1"),
        ({"group_list": [3, 2, 12]}, ValueError, "group_list must hold cumulative ends that do not decrease, got"),
        ({"group_list": [-1, 2, 12]}, ValueError, "do not decrease"),
        ({"group_list": torch.tensor([3, 2, 12])}, ValueError, "do not decrease"),
        ({"group_list": [3, 7, 13]}, ValueError, "must not count more than the 12 rows"),
        ({"group_list": [3, 12]}, ValueError, r"must have one entry per group \(3\), got 2"),
        ({"group_list": torch.tensor([3, 7, 12], dtype=torch.int32)}, TypeError, "group_list must have dtype int64, got int32"),
        ({"group_list": torch.ones(3, dtype=torch.int64, device="meta")}, RuntimeError, "on cpu or on the CPU, got meta"),
        ({"group_list": "3"}, TypeError, "must be a list of int or an int64 tensor, got str"),
        ({"group_list": [3.0, 7, 12]}, TypeError, "must hold integers"),
        ({"group_list": None}, ValueError, "may be left out for a single group only"),
        ({"group_type": -1}, ValueError, "may be -1 for a single group only"),
        ({"weight": torch.ones(3, 7, 6)}, ValueError, "weight must have inner size 8"),
        ({"weight": torch.ones(3, 8, 6).half()}, TypeError, "weight must have dtype float32, got float16"),
        ({"weight": torch.ones(8, 6)}, ValueError, "weight must have 3 dimensions"),
        ({"bias": torch.ones(3, 6).bfloat16()}, TypeError, "bias must have dtype float32, got bfloat16"),
        ({"bias": torch.ones(6)}, ValueError, r"bias must have shape \(3, 6\)"),
    ],
)
def test_errors(change, error, text):
    x, weight = inputs(torch.float32)
    with pytest.raises(error, match=text):
        npu_gmm(**({"x": x, "weight": weight, "group_list": [3, 7, 12]} | change))


def test_group_type_2_has_no_derivative():
    x = torch.randn(4, 12, requires_grad=True)
    with pytest.raises(ValueError, match="group_type must be 0 for inputs that require grad"):
        npu_gmm(x, torch.randn(12, 5), group_list=[3, 12], group_type=2)


def test_strict_mode_checks_values_of_tensors_before_dispatch(monkeypatch):
    monkeypatch.setenv("MINDSPEED_OPS_STRICT", "1")
    x, weight = inputs(torch.float32)
    calls = operator_calls(lambda: pytest.raises(ValueError, npu_gmm_v2, x, weight, group_list=torch.tensor([3, -1, 5])))
    assert not calls


def test_values_on_the_host_are_checked_before_dispatch():
    x, weight = inputs(torch.float32)
    for groups in (torch.tensor([3, 2, 12]), [3, 2, 12], torch.tensor([3, 7, 13])):
        assert not operator_calls(lambda groups=groups: pytest.raises(ValueError, npu_gmm, x, weight, group_list=groups))
