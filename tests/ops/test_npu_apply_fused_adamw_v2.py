import itertools

import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2 as adamw
from mindspeed.testing.operators import check_operator, operator_calls

BODIES = ["auto", "ref"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(shape=(5, 7), param=torch.float32, grad=torch.float32, top=torch.float32):
    state = [
        torch.randn(shape).to(param),
        torch.randn(shape).to(grad),
        torch.randn(shape).to(param),
        torch.rand(shape).to(param),
    ]
    return [*state, torch.rand(shape).to(top)]


def textbook(p, g, m, v, top, t, lr, b1, b2, wd, eps, amsgrad, maximize):
    """One step in float64."""
    p, g, m, v, top = (value.double() for value in (p, g, m, v, top))
    g = -g if maximize else g
    p = p * (1 - lr * wd)
    m = m + (1 - b1) * (g - m)
    v = b2 * v + (1 - b2) * g**2
    top = torch.maximum(top, v)
    root = (top if amsgrad else v).sqrt() / (1 - b2**t) ** 0.5
    return p - lr / (1 - b1**t) * m / (root + eps), m, v, top


def close(value, expected):
    """Equal to one rounding of the exact value, up to float32 noise before it."""
    rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[value.dtype]
    torch.testing.assert_close(value.double(), expected, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("param", "grad", "top"), list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_all_dtypes(param, grad, top, body):
    p, g, m, v, vmax = tensors(param=param, grad=grad, top=top)
    expected = textbook(p, g, m, v, vmax, 3, 0.1, 0.8, 0.9, 0.05, 1e-6, True, False)
    kept = g.clone()
    with backends(f"adamw={body}"):
        assert adamw(p, g, m, v, vmax, torch.tensor([3]), 0.1, 0.8, 0.9, 0.05, 1e-6, True) is None
    for value, exact in zip((p, m, v, vmax), expected, strict=True):
        close(value, exact)
    assert torch.equal(g, kept)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("step", [torch.tensor(1), torch.tensor([1000]), torch.tensor(7.0)])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_options(amsgrad, maximize, step, param, body):
    p, g, m, v, vmax = tensors(param=param)
    before = vmax.clone()
    expected = textbook(p, g, m, v, vmax, step.item(), 0.1, 0.9, 0.999, 0.0, 1e-8, amsgrad, maximize)
    with backends(f"adamw={body}"):
        adamw(p, g, m, v, vmax if amsgrad else None, step, 0.1, amsgrad=amsgrad, maximize=maximize)
    for value, exact in zip((p, m, v), expected, strict=False):
        close(value, exact)
    close(vmax, expected[3] if amsgrad else before.double())


@pytest.mark.parametrize("body", BODIES)
def test_many_steps_equal_torch_optim(body):
    parameter = torch.nn.Parameter(torch.randn(40))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    p, m, v = parameter.detach().clone(), torch.zeros(40), torch.zeros(40)
    with backends(f"adamw={body}"):
        for step in range(1, 11):
            parameter.grad = torch.randn(40)
            optimizer.step()
            adamw(p, parameter.grad, m, v, None, torch.tensor([step]), 0.01, weight_decay=0.1)
    torch.testing.assert_close(p, parameter.detach())


def test_many_blocks_and_strides():
    p, g, m, v, _ = tensors((700, 500), param=torch.bfloat16)
    expected = textbook(p, g, m, v, v, 2, 0.1, 0.9, 0.999, 0.0, 1e-8, False, False)
    strided = [torch.empty(500, 700, dtype=value.dtype).t().copy_(value) for value in (p, g, m, v)]
    adamw(p, g, m, v, None, torch.tensor(2), 0.1)
    adamw(*strided, None, torch.tensor(2), 0.1)
    close(p, expected[0])
    for value, other in zip((p, m, v), (strided[0], *strided[2:]), strict=True):
        assert torch.equal(value, other)


def test_operator_is_well_formed():
    rest = (torch.tensor([2]), 0.1, 0.9, 0.999, 0.0, 1e-8)
    op = torch.ops.mindspeed.adamw_.default
    p, g, m, v, vmax = tensors()
    check_operator(op, (p, g, m, v, None, *rest, False, False), (p, g, m, v, vmax, *rest, True, False))
    check_operator(op, (*tensors((0, 3)), *rest, True, True))
    assert operator_calls(lambda: adamw(p, g, m, v, None, torch.tensor(1))) == {"adamw_": 1}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"exp_avg": torch.ones(2, 2).half()}, TypeError, "exp_avg must have dtype float32, got float16"),
        ({"grad": torch.ones(3)}, ValueError, r"grad must have shape \(2, 2\)"),
        ({"state_step": torch.tensor(1.0, dtype=torch.float64)}, TypeError, "state_step must have dtype int64 or float32"),
        ({"state_step": torch.tensor([1, 2])}, ValueError, "state_step must have one element"),
        ({"amsgrad": True}, TypeError, "max_exp_avg_sq must be a tensor, got NoneType"),
        ({"beta1": 1.0}, ValueError, r"beta1 must lie in \[0, 1\), got 1.0"),
    ],
)
def test_errors(change, error, text):
    arguments = {name: torch.ones(2, 2) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    with pytest.raises(error, match=f"npu_apply_fused_adamw_v2: {text}"):
        adamw(**(arguments | {"max_exp_avg_sq": None, "state_step": torch.tensor(1)} | change))
