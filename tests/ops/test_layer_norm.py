import pytest
import torch
import torch.nn.functional as F

from mindspeed.ops._registry import backends
from mindspeed.ops.layer_norm import layer_norm
from mindspeed.testing.operators import (
    assert_compiles,
    assert_operator_accurate,
    check_operator,
    kept_bytes,
    layouts,
    operator_calls,
)


def textbook(x, weight, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 100), (1, 2), (300, 40)])
def test_values_and_gradients(dtype, shape, body):
    weight, bias = (torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(2))
    for _, x in layouts(torch.randn(shape).to(dtype)):
        with backends(f"layer_norm={body}"):
            assert_operator_accurate(layer_norm, textbook, x.requires_grad_(), weight, bias)
            assert_operator_accurate(layer_norm, textbook, x.requires_grad_(), weight)


def test_agrees_with_torch_in_float32():
    x, weight, bias = torch.randn(9, 33), torch.randn(33), torch.randn(33)
    torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (33,), weight, bias))


def test_aten_bodies_of_devices_agree_with_the_reference():
    from mindspeed.ops import layer_norm as module

    x, weight, bias, dy = torch.randn(5, 8), torch.randn(8), torch.randn(8), torch.randn(5, 8)
    ours = module._native(x, weight, bias, 1e-5)
    for value, expected in zip(ours, module._reference(x, weight, bias, 1e-5), strict=True):
        torch.testing.assert_close(value, expected)
    grads = module._native_backward(dy, x, weight, bias, *ours[1:])
    for value, expected in zip(grads, module._reference_backward(dy, x, weight, bias, *ours[1:]), strict=True):
        torch.testing.assert_close(value, expected)


def test_float32_parameters_with_16_bit_input():
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    weight, bias = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    layer_norm(x, weight, bias).sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_gradcheck(body):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (7,), (7,)))
    with backends(f"layer_norm={body}"):
        torch.autograd.gradcheck(layer_norm, (x, weight, bias))
        torch.autograd.gradcheck(layer_norm, (x, weight))


def test_operator_is_well_formed_and_traces():
    op = torch.ops.mindspeed.layer_norm.default
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = torch.randn(4, 6).to(dtype), torch.randn(6).to(dtype), torch.randn(6).to(dtype)
        check_operator(
            op, (x, weight, bias, 1e-5), (x.clone().requires_grad_(), weight, None, 1e-5), (x[:0], weight, bias, 1e-5)
        )
    x, weight = torch.randn(4, 6), torch.randn(6)
    stats = torch.rand(4, 1)
    check_operator(torch.ops.mindspeed.layer_norm_backward.default, (x, x, weight, weight, stats, stats))
    check_operator(torch.ops.mindspeed.layer_norm_backward.default, (x, x, weight, None, stats, stats))
    assert_compiles(layer_norm, x.requires_grad_(), weight.requires_grad_())


def test_keeps_input_parameters_and_statistics_only():
    x, weight = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True), torch.ones(128, dtype=torch.bfloat16)
    assert kept_bytes(lambda: layer_norm(x, weight)) == 64 * 128 * 2 + 128 * 2 + 2 * 64 * 4


def test_one_call_each_way():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    assert operator_calls(lambda: layer_norm(x, weight).sum().backward()) == {"layer_norm": 1, "layer_norm_backward": 1}


def test_no_rows():
    x, weight = torch.randn(0, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    layer_norm(x, weight, weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(6))


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_equal_row_with_zero_epsilon_is_nan_and_nonfinite_values_spread_in_their_row_only(body):
    x = torch.randn(4, 6)
    x[0], x[1, 2], x[2, 3] = 5.0, float("inf"), float("nan")
    with backends(f"layer_norm={body}"):
        y = layer_norm(x, torch.ones(6), None, 0.0)
    assert y[:3].isnan().all()
    assert y[3].isfinite().all()


def test_errors():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"layer_norm: bias must have shape \(4,\), got \(3,\)"):
        layer_norm(x, torch.ones(4), torch.ones(3))
    with pytest.raises(TypeError, match="layer_norm: weight must have dtype float32, got float16"):
        layer_norm(x, torch.ones(4).half())
    with pytest.raises(ValueError, match="epsilon must not be negative"):
        layer_norm(x, torch.ones(4), None, -1e-5)
