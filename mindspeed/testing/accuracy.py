"""Accuracy with an earned tolerance: err as little as plain torch errs in that dtype against float64.

assert_as_accurate(rms_norm, plain_rms_norm, x, weight)        # values and all gradients
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Accuracy:
    """Largest absolute error of one output or gradient, and what it may be."""

    name: str
    error: float
    allowed: float
    plain_error: float

    @property
    def ok(self) -> bool:
        """Whether the error is allowed (a NaN never is)."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.1e}, allowed {self.allowed:.1e} (plain torch makes {self.plain_error:.1e})"


def with_grads(fn: Callable[..., Any], *inputs: Any, seed: int = 0) -> dict[str, Tensor]:
    """Outputs of `fn` and the gradients of its floating-point inputs that require grad.

    The gradient arriving at each output is random, the same for every dtype. Inputs that are no tensors, or whose
    values are integers, are passed on as they are. If no tensor input requires grad, all floating ones get a gradient.

    Returns:
        `output` (or `output 0`, `output 1` ... when `fn` returns several) and `gradient of input 0` ..., detached.
    """
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
    chosen = [is_floating and x.requires_grad for is_floating, x in zip(floating, inputs, strict=True)]
    wanted = chosen if any(chosen) else floating
    leaves = [_leaf(x, needs_grad) for x, needs_grad in zip(inputs, wanted, strict=True)]
    returned = fn(*leaves)
    outputs = [returned] if isinstance(returned, Tensor) else [item for item in returned if isinstance(item, Tensor)]
    names = ["output"] if isinstance(returned, Tensor) else [f"output {index}" for index in range(len(outputs))]
    result = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
    roots = [output for output in outputs if output.requires_grad]
    if not roots:
        return result
    torch.autograd.backward(roots, [_cotangent(root, seed + index) for index, root in enumerate(roots)])
    for index, (leaf, needs_grad) in enumerate(zip(leaves, wanted, strict=True)):
        if needs_grad:
            result[f"gradient of input {index}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return result


def _leaf(x: Any, needs_grad: bool) -> Any:
    """A leaf with the values and strides of `x`, so that `fn` may neither change nor share it."""
    if not isinstance(x, Tensor):
        return x
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if _is_dense(x) else x.detach().clone()
    return copy.copy_(x.detach()).requires_grad_(needs_grad)


def _is_dense(x: Tensor) -> bool:
    return x.layout == torch.strided and 0 not in x.stride()


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """Random values that every floating dtype represents exactly, so that all runs see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(output.shape, generator=generator).bfloat16().half()
    return values.to(dtype=output.dtype, device=output.device)


def accuracies(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    *inputs: Any,
    slack: float = 2.0,
    floor: float | None = None,
    truth: Callable[..., Any] | None = None,
) -> list[Accuracy]:
    """Error of every output and gradient of `fn`, beside that of `reference` in the same dtype.

    Args:
        reference: textbook torch; run in float64 it is the truth, in the inputs' dtype it sets the allowance.
        slack: how many times the reference's own error is allowed.
        floor: added to the allowance; by default `FLOORS` of the dtype of the output or gradient.
        truth: a definition for float64 inputs when `reference` cannot take them.

    Raises:
        AssertionError: names, shapes or dtypes of the results differ.
    """
    doubles = [x.double().requires_grad_(x.requires_grad) if _is_floating(x) else x for x in map(_detached, inputs)]
    exact = with_grads(truth or reference, *doubles)
    ours, plain = with_grads(fn, *inputs), with_grads(reference, *inputs)
    assert list(ours) == list(plain), f"results are {list(ours)}, the reference has {list(plain)}"
    rows = []
    for name, expected in exact.items():
        got, textbook = ours[name], plain[name]
        form, right = (got.dtype, tuple(got.shape)), (textbook.dtype, tuple(textbook.shape))
        assert form == right, f"{name} is {form}, the reference's is {right}"
        allowance = FLOORS.get(got.dtype, 0.0) if floor is None else floor
        plain_error = _largest_error(textbook, expected)
        rows.append(Accuracy(name, _largest_error(got, expected), slack * plain_error + allowance, plain_error))
    return rows


def assert_as_accurate(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    *inputs: Any,
    slack: float = 2.0,
    floor: float | None = None,
    truth: Callable[..., Any] | None = None,
) -> None:
    """Assert that `fn` and its gradients err at most `slack` times as much as `reference` does in that dtype, plus a floor.

    Arguments as in `accuracies`.
    """
    rows = accuracies(fn, reference, *inputs, slack=slack, floor=floor, truth=truth)
    bad = [str(row) for row in rows if not row.ok]
    assert not bad, "; ".join(bad)


def _detached(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if _is_floating(x) else x


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _largest_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected|; infinite or NaN elements count as right where both agree, and as infinitely wrong elsewhere."""
    if not got.numel():
        return 0.0
    got, expected = got.double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    difference = (got - expected).abs().nan_to_num(nan=float("inf"))
    return torch.where(same, 0.0, difference).max().item()
