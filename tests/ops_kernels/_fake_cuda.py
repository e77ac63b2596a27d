"""CUDA tensors without a GPU or numbers: which calls make the host wait for the device.

Under `FakeTensorMode` a tensor has a device and a shape, and nothing else. The mode here runs the CUDA bodies of our operators on
such tensors, lets Triton kernels do nothing, and raises `Waits` for what a real device would have to be waited for. torch itself
refuses to read a number (`item`, `tolist`, `bool`) or to find a size (`nonzero`, masks as indices) of a fake tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from mindspeed.ops import npu_matmul_add
from mindspeed.ops._registry import REGISTRY

COPIES = ("aten::_to_copy", "aten::copy_")


class Waits(AssertionError):
    """The host would wait for the device here."""


class Context:
    """What a `torch.autograd.Function` gets as `ctx`: fake tensors of a device that is not there cannot go through autograd."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *values: Tensor | None) -> None:
        self.saved_tensors = values

    def mark_non_differentiable(self, *values: Tensor) -> None:
        """Nothing is differentiated here."""

    def set_materialize_grads(self, value: bool) -> None:
        """All gradients are given."""


def derivatives() -> dict[str, type[torch.autograd.Function]]:
    """Function by the operator that its `forward` runs."""
    own = [
        function for function in torch.autograd.Function.__subclasses__() if function.__module__.startswith("mindspeed.ops.")
    ]
    return {
        name: function
        for function in own
        for name in function.forward.__code__.co_consts
        if isinstance(name, str) and name in REGISTRY.operators
    }


class Device(TorchDispatchMode):
    """Runs CUDA bodies of the library `mindspeed` and inspects what they call; `ran` holds (operator, kernel).

    After an operator with a derivative its backward runs too, for all floating operands or for the first one alone.
    """

    def __init__(self, gradients: str) -> None:
        super().__init__()
        self.gradients = gradients
        self.derivatives = derivatives()
        self.ran: list[tuple[str, str]] = []
        self.pinned: set[int] = set()
        self.keep: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        name, kwargs = func.name().partition(".")[0], kwargs or {}
        if not name.startswith("mindspeed::") or not any(value.is_cuda for value in tensors(args)):
            self.check(name, args, kwargs)
            return func(*args, **kwargs)
        operator = REGISTRY.operators[name.removeprefix("mindspeed::")]
        derivative = self.derivatives.pop(operator.name, None) if self.gradients else None  # its forward comes here again
        with self, Indexing():  # torch leaves both when it calls an operator
            if derivative is None:
                result = operator.run("cuda", *args, **kwargs)
                self.ran.append((operator.name, operator.last["cuda"].kernel))
                return result
            result = self.both_ways(derivative, args)
        self.derivatives[operator.name] = derivative
        return result

    def both_ways(self, derivative: type[torch.autograd.Function], args: tuple) -> Any:
        floating = [isinstance(value, Tensor) and value.is_floating_point() for value in args]
        first = floating.index(True)
        needs = tuple(need and (self.gradients == "all" or index == first) for index, need in enumerate(floating))
        context = Context(needs)
        result = derivative.forward(context, *args)
        outputs = result if isinstance(result, tuple) else (result,)
        derivative.backward(context, *(torch.empty_like(output) for output in outputs))
        return result

    def check(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise where a number moves between host and device in a way that waits."""
        given = tensors((args, kwargs))
        if name in COPIES:
            target, source = (kwargs.get("device"), args[0]) if name == COPIES[0] else (args[0].device, args[1])
            later = kwargs.get("non_blocking", name == COPIES[1] and len(args) > 2 and args[2])
            if target is not None and {target.type, source.device.type} == {"cpu", "cuda"} and source.numel():
                if target.type == "cpu" or not later or id(source) not in self.pinned:
                    raise Waits(f"{name} from {source.device} to {target}")
        elif name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_") and args[0].is_cuda:
            for index in tensors(args[1]):
                if index.dtype in (torch.bool, torch.uint8) or not index.is_cuda:
                    raise Waits(f"{name} by {index.dtype} on {index.device}")
        elif name in ("aten::equal", "aten::is_nonzero", "aten::allclose") and given[0].is_cuda:
            raise Waits(name)

    @property
    def copy(self) -> Any:
        """Stand-in for `Tensor.copy_`, which asks for a real device."""

        def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            self.check("aten::copy_", (target, source, non_blocking), {})
            return target

        return copy_

    def pin(self, value: Tensor) -> Tensor:
        """Stand-in for `Tensor.pin_memory`."""
        assert value.device.type == "cpu"
        copy = torch.empty(value.shape, dtype=value.dtype)  # torch would compute with the value of a copy of one number
        self.pinned.add(id(copy))
        self.keep.append(copy)
        return copy


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def on_device(tree: Any) -> Any:
    """Fake tensors of the same strides on the device for all real ones."""
    return tree_map_only(
        Tensor, lambda value: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0"), tree
    )


_tolist, _tensor = Tensor.tolist, torch.tensor


def _contiguous(value: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return value if value.is_contiguous() else value.clone(memory_format=torch.contiguous_format)


def _numbers(value: Tensor) -> list:
    if value.is_cuda:
        raise Waits(f"tolist of a tensor on {value.device}")
    with _disable_current_modes():
        return _tolist(value)


def _number(data: Any, **options: Any) -> Tensor:
    """`torch.tensor`; what stays on the host is real there, so that it can be read."""
    if torch.device(options.get("device") or "cpu").type != "cpu":
        return _tensor(data, **options)
    with _disable_current_modes():
        return _tensor(data, **options)


def _view(value: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that an index names, and tensors that index it further. torch's own indexing asks for a real device."""
    parts = index if isinstance(index, tuple) else (index,)
    missing = value.dim() - sum(part is not None and part is not Ellipsis for part in parts)
    place = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    dim, picks = 0, {}
    for part in (*parts[:place], *(slice(None),) * missing, *parts[place + 1 :]):
        if isinstance(part, Tensor):
            picks[dim] = part
        elif part is None:
            value = value.unsqueeze(dim)
        elif isinstance(part, slice):
            value = torch.ops.aten.slice.Tensor(value, dim, part.start, part.stop, 1 if part.step is None else part.step)
        else:
            value, dim = value.select(dim, part), dim - 1
        dim += 1
    return value, [picks.get(i) for i in range(max(picks) + 1)] if picks else []


def _get(value: Tensor, index: Any) -> Tensor:
    if not isinstance(value, FakeTensor):
        return value[index]
    found, picks = _view(value, index)
    return torch.ops.aten.index.Tensor(found, picks) if picks else found


def _set(value: Tensor, index: Any, new: Any) -> None:
    if not isinstance(value, FakeTensor):
        value[index] = new
        return
    found, picks = _view(value, index)
    if picks:
        given = new if isinstance(new, Tensor) else torch.full((), new, dtype=found.dtype, device=found.device)
        torch.ops.aten.index_put_(found, picks, given)
    elif isinstance(new, Tensor):
        found.copy_(new.expand(found.shape))
    else:
        found.fill_(new)


class Indexing(TorchFunctionMode):
    """Stand-ins for what Python's operators of tensors do before anything is dispatched.

    A mode and not a patch: Python never takes back that a class was given a `__getitem__`, and `torch.tensor` would take every
    number for a sequence in all tests that follow.
    """

    STAND_INS = {Tensor.__getitem__: _get, Tensor.__setitem__: _set, Tensor.__invert__: torch.ops.aten.bitwise_not}

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        return self.STAND_INS.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), gradients: str = "all"
) -> Iterator[Device]:
    """A device of this capability with 132 processors; the random state is that of a generator on the host."""
    from triton.runtime.jit import JITFunction

    state = {"offset": 0}
    generator = SimpleNamespace(
        initial_seed=lambda: 7, get_offset=lambda: state["offset"], set_offset=lambda value: state.update(offset=value),
        get_state=lambda: None, set_state=lambda value: None, manual_seed=lambda value: None,
    )  # fmt: skip
    mode = Device(gradients)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_of", lambda value: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,), raising=False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda value: mode.pin(value))
    monkeypatch.setattr(Tensor, "data_ptr", lambda value: 0)
    monkeypatch.setattr(Tensor, "copy_", mode.copy)
    monkeypatch.setattr(Tensor, "contiguous", _contiguous)
    monkeypatch.setattr(Tensor, "tolist", _numbers)
    monkeypatch.setattr(torch, "tensor", _number)
    monkeypatch.setattr(npu_matmul_add, "_wide_addmm", lambda *_: None)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    with FakeTensorMode(allow_non_fake_inputs=True), mode, Indexing():
        yield mode
