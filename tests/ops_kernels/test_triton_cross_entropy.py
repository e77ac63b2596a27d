"""Cross entropy kernels in Triton, under the interpreter, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.triton_interpreter import triton_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("vocab_parallel_cross_entropy", "vocab_parallel_cross_entropy_backward")


def ran_triton():
    from mindspeed.ops import backend_report

    report = backend_report(torch.get_default_device().type)
    assert {name: report[name].kernel for name in NAMES} == dict.fromkeys(NAMES, "triton"), report


def tokens(*shape, columns, dtype=torch.float32):
    target = torch.randint(0, columns, shape)
    target.view(-1)[0] = -100
    return (3 * torch.randn(*shape, columns)).to(dtype).requires_grad_(), target


@triton_interpreter("cross_entropy=triton")
@pytest.mark.parametrize(("shape", "columns"), [((2, 3), 100), ((7,), 16), ((), 5), ((3,), 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, columns):
    from mindspeed.ops.cross_entropy import _reference, vocab_parallel_cross_entropy
    from mindspeed.testing.operators import assert_operator_accurate

    logits, target = tokens(*shape, columns=columns, dtype=dtype)
    assert_operator_accurate(
        lambda x: vocab_parallel_cross_entropy(x, target), lambda x: _reference(x, target, 0, "")[0], logits
    )
    ran_triton()


@triton_interpreter("cross_entropy=triton")
def test_rows_longer_than_a_block_and_strided():
    from mindspeed.ops.cross_entropy import _reference, vocab_parallel_cross_entropy
    from mindspeed.testing.operators import assert_operator_accurate

    logits, target = tokens(2, 2, columns=2 * 8192 + 3)
    logits = logits.detach().transpose(0, 1).requires_grad_()
    assert_operator_accurate(
        lambda x: vocab_parallel_cross_entropy(x, target), lambda x: _reference(x, target, 0, "")[0], logits
    )
    ran_triton()


@triton_interpreter("cross_entropy=triton")
def test_a_shard_that_is_masked_or_lacks_the_target():
    from mindspeed.ops._registry import backends
    from mindspeed.ops.cross_entropy import _reference_backward

    logits, target = tokens(4, columns=9)
    logits = logits.detach()
    logits[1] = -float("inf")
    logits[2, 4] = float("nan")
    target[3] = 2  # of the shard before this one
    forward, backward = (getattr(torch.ops.mindspeed, name) for name in NAMES)
    with backends("cross_entropy=ref"):
        expected = forward(logits, target, 9, "")
    ours = forward(logits, target, 9, "")
    torch.testing.assert_close(ours[0], expected[0], equal_nan=True)
    seen = [0, 1, 3]  # a maximum may or may not see a NaN; the sum does
    torch.testing.assert_close(ours[1][:, seen], expected[1][:, seen])
    assert ours[1][1, 1] == 0 and ours[0][2].isnan()
    dloss = torch.ones(4)
    dlogits = backward(dloss, logits, target, expected[1], 9)
    torch.testing.assert_close(dlogits, _reference_backward(dloss, logits, target, expected[1], 9), equal_nan=True)
    ran_triton()
