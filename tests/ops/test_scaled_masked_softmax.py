import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax
from mindspeed.testing.operators import assert_compiles, assert_operator_accurate, check_operator, kept_bytes, layouts

MASKS = [None, (5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7)]


def textbook(mask, scale, causal):
    def form(x):
        scores = x * scale
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        if causal:
            scores = scores.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return torch.softmax(scores, -1)

    return form


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_shape", MASKS)
def test_values_and_gradients(mask_shape, causal, dtype, body):
    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.4
    if mask is not None:
        mask[..., 0] = False  # no row is excluded completely: the textbook form would give NaN
    for _, x in layouts(torch.randn(2, 3, 5, 7).to(dtype)):
        with backends(f"scaled_masked_softmax={body}"):
            run = lambda x: scaled_masked_softmax(x, mask, 0.3, causal)  # noqa: E731
            assert_operator_accurate(run, textbook(mask, 0.3, causal), x.requires_grad_())


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_rows_without_entries_are_zero_with_zero_gradient(body):
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    mask[..., 1, :] = 1
    mask[..., 2, :3] = 1
    with backends(f"scaled_masked_softmax={body}"):
        y = scaled_masked_softmax(x, mask, 2.0, causal=True)
        y.square().sum().backward()
    assert torch.equal(y[:, :, 1], torch.zeros(1, 2, 4))
    assert torch.equal(y[:, :, 2], torch.zeros(1, 2, 4))  # what the mask leaves, causality excludes
    assert x.grad.isfinite().all() and torch.equal(x.grad[:, :, 1], torch.zeros(1, 2, 4))


@pytest.mark.parametrize("body", ["auto", "ref"])
def test_gradcheck(body):
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    with backends(f"scaled_masked_softmax={body}"):
        torch.autograd.gradcheck(lambda x: scaled_masked_softmax(x, None, 0.7, True), (x,))


def test_operators_are_well_formed_and_trace():
    ops = torch.ops.mindspeed
    mask = torch.rand(2, 1, 4, 6) < 0.5
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 4, 6).to(dtype)
        check_operator(
            ops.scaled_masked_softmax.default,
            (x, mask, 0.5, False),
            (x.clone().requires_grad_(), None, 1.0, True),
            (x.transpose(0, 1), None, 1.0, False),
            (x[:0], None, 1.0, True),
        )
    check_operator(ops.scaled_masked_softmax_backward.default, (x, x.clone(), 0.5))
    assert_compiles(lambda x: scaled_masked_softmax(x, None, 0.5, True), torch.randn(2, 4, 4, requires_grad=True))


def test_keeps_the_output_only():
    x = torch.randn(2, 2, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    assert kept_bytes(lambda: scaled_masked_softmax(x, mask, 0.5)) == x.numel() * 2


def test_errors():
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"mask must broadcast to x of shape \(2, 3, 4, 4\), got shape \(3, 4\)"):
        scaled_masked_softmax(x, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must have dtype bool or uint8, got float32"):
        scaled_masked_softmax(x, torch.ones(4, 4))
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        scaled_masked_softmax(torch.ones(4))
