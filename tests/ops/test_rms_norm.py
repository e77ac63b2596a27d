import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.rms_norm import rms_norm
from mindspeed.testing.operators import (
    assert_compiles,
    assert_operator_accurate,
    check_operator,
    kept_bytes,
    layouts,
    operator_calls,
)


def textbook(x, gamma, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gamma


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 100), (1, 1), (300, 40)])
def test_values_and_gradients(dtype, shape, body):
    x, gamma = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    for _, layout in layouts(x):
        with backends(f"rms_norm={body}"):
            assert_operator_accurate(rms_norm, textbook, layout.requires_grad_(), gamma.requires_grad_())


def test_float32_gamma_with_16_bit_input():
    x, gamma = torch.randn(4, 32).bfloat16().requires_grad_(), torch.randn(32).requires_grad_()
    y = rms_norm(x, gamma)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, gamma.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_operator_accurate(rms_norm, lambda x, g: textbook(x.to(g.dtype), g).to(x.dtype), x, gamma)


def test_rounds_once():
    x, gamma = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    exact = textbook(x.double(), gamma.double())
    assert torch.equal(rms_norm(x, gamma), exact.float().bfloat16())


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_gradcheck(body):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with backends(f"rms_norm={body}"):
        torch.autograd.gradcheck(rms_norm, (x, gamma))


def test_two_dimensional_gamma():
    x, gamma = torch.randn(5, 4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    assert_operator_accurate(rms_norm, lambda x, g: textbook(x.flatten(1), g.flatten()).view(x.shape), x, gamma)


def test_operator_is_well_formed_and_traces():
    op = torch.ops.mindspeed.rms_norm.default
    for dtype in (torch.float32, torch.bfloat16):
        x, gamma = torch.randn(4, 6).to(dtype), torch.randn(6).to(dtype)
        check_operator(
            op,
            (x, gamma, 1e-6),
            (x.clone().requires_grad_(), gamma.clone().requires_grad_(), 1e-6),
            (torch.randn(6, 4).to(dtype).t(), gamma, 1e-6),
            (x[:0], gamma, 1e-6),
        )
    x, gamma = torch.randn(4, 6), torch.randn(6)
    check_operator(torch.ops.mindspeed.rms_norm_backward.default, (x, x, gamma, torch.rand(4, 1)))
    assert_compiles(rms_norm, x.requires_grad_(), gamma.requires_grad_())


def test_keeps_input_weight_and_statistics_only():
    x, gamma = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True), torch.ones(128, dtype=torch.bfloat16)
    assert kept_bytes(lambda: rms_norm(x, gamma)) == 64 * 128 * 2 + 128 * 2 + 64 * 4


def test_one_call_each_way():
    x, gamma = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    assert operator_calls(lambda: rms_norm(x, gamma).sum().backward()) == {"rms_norm": 1, "rms_norm_backward": 1}


def test_no_rows():
    x, gamma = torch.randn(0, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    rms_norm(x, gamma).sum().backward()
    assert x.grad.shape == (0, 6)
    assert torch.equal(gamma.grad, torch.zeros(6))


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_zero_row_with_zero_epsilon_is_nan_and_nonfinite_values_spread_in_their_row_only(body):
    x = torch.randn(4, 6)
    x[0], x[1, 2], x[2, 3] = 0, float("inf"), float("nan")
    with backends(f"rms_norm={body}"):
        y = rms_norm(x, torch.ones(6), 0.0)
    assert y[0].isnan().all()
    assert y[1, 2].isnan()
    assert y[2].isnan().all()
    assert y[3].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0], torch.ones(1)), TypeError, "rms_norm: x must be a tensor, got list"),
        ((torch.ones(2, 4, dtype=torch.int64), torch.ones(4)), TypeError, "rms_norm: x must have dtype .*got int64"),
        ((torch.ones(2, 4), torch.ones(5)), ValueError, r"rms_norm: gamma must have shape \(4,\), got \(5,\)"),
        ((torch.ones(2, 4), torch.ones(4).half()), TypeError, "rms_norm: gamma must have dtype .*got float16"),
        ((torch.ones(2, 4), torch.ones(4, device="meta")), RuntimeError, "gamma must be on cpu like x, got meta"),
        ((torch.ones(2, 4), torch.ones(4), -1.0), ValueError, "epsilon must not be negative, got -1.0"),
        ((torch.ones(()), torch.ones(1)), ValueError, "x must have at least 1 dimension"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        rms_norm(*arguments)
