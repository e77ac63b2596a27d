import pytest
import torch
import torch.nn.functional as F

from mindspeed.ops._registry import backends
from mindspeed.ops.swiglu import bias_swiglu, swiglu, weighted_swiglu
from mindspeed.testing.operators import (
    assert_compiles,
    assert_operator_accurate,
    check_operator,
    kept_bytes,
    layouts,
    operator_calls,
)


def textbook(x, dim=-1):
    a, b = x.chunk(2, dim)
    return F.silu(a) * b


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 64), (7, 50), (2,), (200, 6)])
def test_values_and_gradients(dtype, shape, body):
    for _, x in layouts(torch.randn(shape).to(dtype)):
        x.requires_grad_()
        rows = x.shape[:-1]
        bias, weights = torch.randn(shape[-1]).to(dtype).requires_grad_(), torch.rand(*rows, 1).to(dtype).requires_grad_()
        with backends(f"swiglu={body}"):
            assert_operator_accurate(swiglu, textbook, x)
            assert_operator_accurate(bias_swiglu, lambda x, b: textbook(x + b), x, bias)
            assert_operator_accurate(weighted_swiglu, lambda x, p: textbook(x) * p, x, weights)


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_other_dimensions(dim):
    x = torch.randn(4, 6, 3, requires_grad=True)
    assert_operator_accurate(lambda x: swiglu(x, dim), lambda x: textbook(x, dim), x)


def test_float32_weights_with_16_bit_input_keep_their_dtype():
    x, weights = torch.randn(5, 8).bfloat16().requires_grad_(), torch.rand(5, 1, requires_grad=True)
    y = weighted_swiglu(x, weights)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weights.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_gradcheck(body):
    x, bias, weights = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,), (3, 1)))
    with backends(f"swiglu={body}"):
        torch.autograd.gradcheck(swiglu, (x,))
        torch.autograd.gradcheck(bias_swiglu, (x, bias))
        torch.autograd.gradcheck(weighted_swiglu, (x, weights))


def test_operators_are_well_formed_and_trace():
    ops = torch.ops.mindspeed
    for dtype in (torch.float32, torch.bfloat16):
        x, bias, weights = torch.randn(4, 6).to(dtype), torch.randn(6).to(dtype), torch.rand(4, 1).to(dtype)
        check_operator(
            ops.swiglu.default, (x, 1), (x.clone().requires_grad_(), 1), (torch.randn(6, 4).to(dtype).t(), 0), (x[:0], 1)
        )
        check_operator(ops.bias_swiglu.default, (x.clone().requires_grad_(), bias), (x[:0], bias))
        check_operator(ops.swiglu_weighted.default, (x.clone().requires_grad_(), weights), (x[:0], weights[:0]))
    dy = torch.randn(4, 3)
    x, bias, weights = torch.randn(4, 6), torch.randn(6), torch.rand(4, 1)
    check_operator(ops.swiglu_backward.default, (dy, x, 1))
    check_operator(ops.bias_swiglu_backward.default, (dy, x, bias))
    check_operator(ops.swiglu_weighted_backward.default, (dy, x, weights))
    assert_compiles(swiglu, x.requires_grad_())


def test_keeps_the_input_only():
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    assert kept_bytes(lambda: swiglu(x)) == 64 * 32 * 2
    weights = torch.rand(64, 1)
    assert kept_bytes(lambda: weighted_swiglu(x, weights)) == 64 * 32 * 2 + 64 * 4


def test_one_call_each_way():
    x = torch.randn(4, 6, requires_grad=True)
    assert operator_calls(lambda: swiglu(x).sum().backward()) == {"swiglu": 1, "swiglu_backward": 1}


def test_no_rows():
    x = torch.randn(0, 6, requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad.shape == (0, 6)


def test_nonfinite_values_spread_as_in_the_formula():
    x = torch.tensor([[float("nan"), 1.0, 1.0, 1.0], [float("inf"), float("-inf"), 1.0, 1.0]])
    torch.testing.assert_close(swiglu(x), textbook(x), equal_nan=True)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: swiglu(torch.ones(2, 5)), ValueError, r"swiglu: x must have an even size along dim -1, got shape \(2, 5\)"),
        (lambda: swiglu(torch.ones(2, 4).int()), TypeError, "swiglu: x must have dtype .* got int32"),
        (lambda: swiglu(torch.ones(2, 4), 2), ValueError, "swiglu: dim must be a dimension of x .* got 2"),
        (lambda: bias_swiglu(torch.ones(2, 4), torch.ones(2)), ValueError, r"bias must have shape \(4,\), got \(2,\)"),
        (lambda: weighted_swiglu(torch.ones(2, 4), torch.ones(2)), ValueError, r"weights must have shape \(2, 1\), got \(2,\)"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
