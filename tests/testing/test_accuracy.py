"""The earned tolerance: right code passes, wrong values, gradients, shapes and NaN do not."""

import pytest
import torch

from mindspeed.testing import assert_as_accurate, with_grads
from mindspeed.testing.accuracy import accuracies


def square(x):
    return x * x


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_code_passes_and_its_error_is_plain_torchs(dtype):
    x = torch.randn(64, dtype=dtype)
    assert_as_accurate(lambda t: t.square(), square, x)
    rows = accuracies(square, square, x)
    assert [row.name for row in rows] == ["output", "gradient of input 0"]
    assert all(row.error == row.plain_error > 0 for row in rows[:1])


def test_wrong_value_gradient_shape_and_dtype_are_refused():
    x = torch.randn(64)
    with pytest.raises(AssertionError, match="output: error 1.0e-02"):
        assert_as_accurate(lambda t: t * t + 0.01, square, x)
    with pytest.raises(AssertionError, match="gradient of input 0: error"):
        assert_as_accurate(WrongGradient.apply, square, x)
    with pytest.raises(AssertionError, match=r"the reference's is \(torch.float32, \(64,\)\)"):
        assert_as_accurate(lambda t: (t * t)[:32], square, x)
    with pytest.raises(AssertionError, match="torch.bfloat16"):
        assert_as_accurate(lambda t: (t * t).bfloat16(), square, x)


def test_nan_is_right_only_where_the_truth_is_nan():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert_as_accurate(square, square, x)
    with pytest.raises(AssertionError, match="error inf"):
        assert_as_accurate(lambda t: t * t + torch.tensor([float("nan"), 0, 0]), square, x)
    with pytest.raises(AssertionError, match="error inf"):
        assert_as_accurate(lambda t: (t * t).nan_to_num(), square, x)


def test_chosen_inputs_other_arguments_and_several_outputs():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(3)
    results = with_grads(lambda a, b, rows, scale: (a[rows] * b * scale, rows), x, weight, torch.tensor([0, 2]), 2.0)
    assert list(results) == ["output 0", "output 1", "gradient of input 0"]
    assert results["gradient of input 0"][1].eq(0).all() and x.grad is None


def test_inputs_keep_their_strides_and_values():
    x = torch.randn(4, 3).t()
    before, seen = x.clone(), []

    def spoil(t):
        seen.append(t.stride())
        with torch.no_grad():
            t.detach().zero_()
        return t * 1.0

    with_grads(spoil, x)
    assert seen == [x.stride()] and torch.equal(x, before)


def test_an_unused_input_has_a_zero_gradient():
    results = with_grads(lambda a, b: a * 2, torch.ones(2), torch.ones(2))
    assert results["gradient of input 1"].eq(0).all()


def test_empty_results_are_right():
    assert_as_accurate(square, square, torch.empty(0, 3))
