"""The operator checks find what they are for."""

import pytest
import torch
from torch.testing._internal.optests.generate_tests import OpCheckError

from mindspeed.ops.rms_norm import rms_norm
from mindspeed.testing.operators import (
    assert_compiles,
    assert_operator_accurate,
    check_operator,
    kept_bytes,
    layouts,
    operator_calls,
)


def square(x):
    return x * x


def breaks(x):
    torch._dynamo.graph_break()
    return x + 1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0]


def test_accuracy_accepts_equal_work_and_rejects_worse():
    x = torch.randn(50).bfloat16().requires_grad_()
    assert_operator_accurate(square, square, x)
    with pytest.raises(AssertionError, match="output 0 .*: error .*, allowed"):
        assert_operator_accurate(lambda x: x * x * 1.05, square, x)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_operator_accurate(WrongGradient.apply, square, x)
    with pytest.raises(AssertionError, match="shape"):
        assert_operator_accurate(lambda x: (x * x)[None], square, x)
    with pytest.raises(AssertionError, match="error nan"):
        assert_operator_accurate(lambda x: x * float("nan"), square, x)


def test_accuracy_wants_the_same_gradients():
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(AssertionError, match="operator gives"):
        assert_operator_accurate(lambda x: (x * x).detach(), square, x)


def test_kept_bytes_counts_storages_once():
    x = torch.randn(10, 4, requires_grad=True)
    assert kept_bytes(lambda: x * x) == 160
    assert kept_bytes(lambda: x.exp()) == 160
    assert kept_bytes(lambda: x + 1) == 0


def test_calls_are_counted_by_name():
    x, gamma = torch.randn(2, 4), torch.ones(4)
    assert operator_calls(lambda: (rms_norm(x, gamma), rms_norm(x, gamma))) == {"rms_norm": 2}
    assert operator_calls(lambda: x + x, "aten") == {"add.Tensor": 1}


def test_layouts_have_equal_values():
    x = torch.randn(3, 4)
    found = dict(layouts(x))
    assert list(found) == ["contiguous", "transposed", "strided"]
    assert all(torch.equal(value, x) for value in found.values())
    assert [value.is_contiguous() for value in found.values()] == [True, False, False]


def test_a_wrong_fake_and_a_graph_break_are_found():
    with torch.library._scoped_library("mindspeed_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("mindspeed_test::double", lambda x: x.new_empty(3), lib=library)
        with pytest.raises(OpCheckError):
            check_operator(torch.ops.mindspeed_test.double.default, (torch.ones(2),))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        assert_compiles(breaks, torch.ones(2))
    torch._dynamo.reset()
