import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.sort_chunks import sort_chunks
from mindspeed.testing.operators import assert_compiles, assert_operator_accurate, check_operator, operator_calls


def textbook(sizes, order):
    return lambda x: torch.cat([x.split(sizes)[place] for place in order])


CASES = [([2, 3, 1], [2, 0, 1]), ([0, 6, 0], [1, 2, 0]), ([6], [0]), ([1, 0, 2, 0, 3], [4, 3, 2, 1, 0])]


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "order"), CASES)
@pytest.mark.parametrize("shape", [(6, 4), (6,), (6, 2, 3)])
def test_values_and_gradients(sizes, order, dtype, shape, body):
    x = torch.randn(shape).to(dtype).requires_grad_()
    with backends(f"sort_chunks={body}"):
        run = lambda x: sort_chunks(x, torch.tensor(sizes), torch.tensor(order, dtype=torch.int32))  # noqa: E731
        assert_operator_accurate(run, textbook(sizes, order), x)


def test_operator_is_well_formed_and_traces():
    x, sizes, order = torch.randn(6, 4), torch.tensor([2, 3, 1]), torch.tensor([2, 0, 1])
    check_operator(
        torch.ops.mindspeed.sort_chunks.default,
        (x, sizes, order),
        (x.clone().requires_grad_(), sizes, order),
        (x[:0], torch.tensor([0, 0, 0]), order),
    )
    assert_compiles(lambda x: sort_chunks(x, sizes, order), x.requires_grad_())
    assert operator_calls(lambda: sort_chunks(x, sizes, order).sum().backward()) == {"sort_chunks": 2}


def test_no_rows_and_no_chunks():
    assert sort_chunks(torch.randn(0, 3), torch.tensor([0, 0]), torch.tensor([1, 0])).shape == (0, 3)
    empty = torch.zeros(0, dtype=torch.int64)
    assert sort_chunks(torch.randn(0, 3), empty, empty).shape == (0, 3)


@pytest.mark.parametrize(
    ("sizes", "order", "error", "text"),
    [
        ([2, 3], [1, 0], ValueError, "split_sizes must sum to the 6 rows of x, got"),
        ([7, -1], [1, 0], ValueError, "split_sizes must not be negative"),
        ([2, 4], [1, 1], ValueError, "order must be a permutation of 2 chunks"),
        ([2, 4], [1], ValueError, r"order must have shape \(2,\)"),
        ([2.0, 4.0], [1, 0], TypeError, "split_sizes must have dtype int32 or int64"),
    ],
)
def test_errors(sizes, order, error, text):
    with pytest.raises(error, match=f"sort_chunks: {text}"):
        sort_chunks(torch.randn(6, 2), torch.tensor(sizes), torch.tensor(order))


def test_values_on_the_host_are_checked_before_dispatch():
    def run():
        with pytest.raises(ValueError, match="split_sizes must sum to the 0 rows"):
            sort_chunks(torch.randn(0, 3), torch.tensor([5]), torch.tensor([0]))
        with pytest.raises(ValueError, match=r"x must have at least 1 dimension, got shape \(\)"):
            sort_chunks(torch.tensor(1.0), torch.tensor([1]), torch.tensor([0]))

    assert not operator_calls(run)


def test_wrong_device():
    sizes = torch.tensor([6], device="meta")
    with pytest.raises(RuntimeError, match="split_sizes must be on cpu or on the CPU, got meta"):
        sort_chunks(torch.randn(6, 2), sizes, torch.tensor([0]))
