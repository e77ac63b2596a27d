"""What every operator of `mindspeed.ops` must pass: tracing rules, accuracy against float64, kept bytes, calls."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ABSOLUTE_SLACK = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Allowed beyond twice the error of plain torch in the same dtype."""


def assert_operator_accurate(
    operator: Callable, textbook: Callable, *inputs: object, slack: float = 2.0, gradients: bool = True
) -> None:
    """Values and gradients of `operator` err at most `slack` times as much as `textbook` does in the inputs' dtypes.

    The truth is `textbook` with every float input in float64. Inputs that require grad get their gradients compared; all
    others are passed on. `operator` and `textbook` return a tensor or a sequence of tensors of equal count.
    """
    exact = _with_gradients(textbook, inputs, gradients, wide=True)
    ours, plain = (_with_gradients(function, inputs, gradients, wide=False) for function in (operator, textbook))
    assert ours.keys() == exact.keys(), f"operator gives {sorted(ours)}, the textbook form {sorted(exact)}"
    for name, truth in exact.items():
        value = ours[name]
        assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
        allowed = slack * _error(plain[name], truth) + ABSOLUTE_SLACK[value.dtype] * max(1.0, _largest(truth))
        error = _error(value, truth)
        assert error <= allowed, f"{name} ({value.dtype}): error {error:.2e}, allowed {allowed:.2e}"


def _error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def _largest(truth: Tensor) -> float:
    return truth.abs().max().item() if truth.numel() else 0.0


def _with_gradients(function: Callable, inputs: Sequence[object], gradients: bool, wide: bool) -> dict[str, Tensor]:
    arguments = []
    for value in inputs:
        if isinstance(value, Tensor):
            needs_grad = value.requires_grad and gradients
            value = value.detach().double() if wide and value.is_floating_point() else value.detach()
            value.requires_grad_(needs_grad)
        arguments.append(value)
    returned = function(*arguments)
    outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    leaves = {index: value for index, value in enumerate(arguments) if isinstance(value, Tensor) and value.requires_grad}
    roots = [output for output in outputs if output.requires_grad]
    if leaves and roots:
        generator = torch.Generator().manual_seed(97)
        weights = [torch.randn(root.shape, generator=generator, dtype=torch.float64, device="cpu").to(root) for root in roots]
        got = torch.autograd.grad(roots, list(leaves.values()), weights)
        found |= {f"gradient of input {index}": grad for index, grad in zip(leaves, got, strict=True)}
    return found


def check_operator(operator: object, *samples: tuple) -> None:
    """Run the four parts of `torch.library.opcheck` on each tuple of arguments."""
    for sample in samples:
        torch.library.opcheck(operator, sample)


def assert_compiles(function: Callable, *inputs: object) -> None:
    """The function traces without graph break under `aot_eager` and gives the same values and gradients, also when called again.

    All runs start from the same random state, so that dropout may be compared.
    """

    def run(function: Callable) -> dict[str, Tensor]:
        torch.manual_seed(97)
        return _with_gradients(function, inputs, gradients=True, wide=False)

    plain = run(function)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for name, value in run(compiled).items():
            torch.testing.assert_close(value, plain[name], msg=lambda text, name=name: f"{name}: {text}")
    torch._dynamo.reset()


def kept_bytes(function: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward while `function` runs, each storage counted once at the size of its views."""
    seen: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        seen.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = function()
    del result
    return sum(value.numel() * value.element_size() for value in seen.values())


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.seen[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def operator_calls(function: Callable[[], object], namespace: str = "mindspeed") -> Counter[str]:
    """How often `function` calls each dispatcher operator of a namespace, for example `{"rms_norm": 1}`."""
    with _Calls() as calls:
        function()
    prefix = f"{namespace}."
    return Counter({name.removeprefix(prefix): count for name, count in calls.seen.items() if name.startswith(prefix)})


def layouts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values contiguous, transposed in memory, and as every second element of a larger tensor."""
    yield "contiguous", value.contiguous()
    if value.dim() >= 2:
        yield "transposed", value.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.full((*value.shape, 2), float("nan") if value.is_floating_point() else -1, dtype=value.dtype)
    spread[..., 0] = value
    yield "strided", spread[..., 0]


COLLECTIVES = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """The names of the collectives called in the block, in order, also inside operators where no dispatch mode looks."""
    seen: list[str] = []

    def watched(name: str) -> Callable:
        original = getattr(dist, name)

        def call(*args: object, **kwargs: object) -> object:
            seen.append(name)
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, watched(name)))
        yield seen
