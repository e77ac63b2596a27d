import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw as ema_adamw
from mindspeed.testing.operators import check_operator


def tensors(shape=(5, 7)):
    return [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape), torch.randn(shape)]


def textbook(g, p, m, v, s, t, lr, decay, b1, b2, eps, mode, correct, wd):
    g, p, m, v, s = (value.double() for value in (g, p, m, v, s))
    g = g + wd * p * (1 - mode)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    c1, c2 = (1 - b1**t, 1 - b2**t) if correct else (1, 1)
    p = p - lr * ((m / c1) / ((v / c2).sqrt() + eps) + wd * p * mode)
    return p, m, v, decay * s + (1 - decay) * p


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (600, 600)])
@pytest.mark.parametrize("strided", [False, True])
def test_one_step(mode, correct, shape, strided, body):
    g, p, m, v, s = tensors(shape)
    if strided:
        g, p, m, v, s = (value.t().contiguous().t() for value in (g, p, m, v, s))
    expected = textbook(g, p, m, v, s, 4, 0.1, 0.9, 0.8, 0.95, 1e-6, mode, correct, 0.05)
    with backends(f"ema_adamw={body}"):
        results = ema_adamw(g, p, m, v, s, torch.tensor([4]), 0.1, 0.9, 0.8, 0.95, 1e-6, mode, correct, 0.05)
    assert all(result is given for result, given in zip(results, (p, m, v, s), strict=True))
    for value, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=2e-6)


def test_operator_is_well_formed():
    rest = (torch.tensor([2]), 0.1, 0.9, 0.9, 0.999, 1e-8, 1)
    check_operator(torch.ops.mindspeed.ema_adamw_.default, (*tensors(), *rest, True, 0.1), (*tensors((0,)), *rest, False, 0.0))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mode": 2}, ValueError, "mode must be one of 0, 1, got 2"),
        ({"s": torch.ones(3)}, ValueError, r"s must have shape \(2, 2\)"),
        ({"m": torch.ones(2, 2).half()}, TypeError, "m must have dtype float32, got float16"),
        ({"step": torch.tensor(1.0)}, TypeError, "step must have dtype int64"),
        ({"ema_decay": 1.5}, ValueError, r"ema_decay must lie in \[0, 1\]"),
    ],
)
def test_errors(change, error, text):
    arguments = {name: torch.ones(2, 2) for name in ("grad", "var", "m", "v", "s")} | {"step": torch.tensor([1])}
    with pytest.raises(error, match=f"npu_apply_fused_ema_adamw: {text}"):
        ema_adamw(**(arguments | change))
