"""Meters of memory: bytes that autograd keeps for backward, and bytes that are alive.

    with saved_bytes(model) as saved:
        loss = model(x)
        assert saved.bytes == ...               # while the graph is alive

    with LiveMemory(model, optimizer) as memory:
        step()
    print(memory.peak, memory.by_kind())

Assert differences (feature on minus off) exactly on CPU; absolute totals belong to whatever torch version runs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed.platform.memory import StorageMeter


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that autograd holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage_bytes: int


class SavedBytes:
    """What autograd holds right now of the graph built inside the block; every storage counts once, views are free."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {_storage_key(parameter) for parameter in parameters}
        self._packed: weakref.WeakSet[_Packed] = weakref.WeakSet()

    @property
    def bytes(self) -> int:
        """Bytes of all storages held, without those of parameters."""
        return sum(self._storages(of_parameters=False).values())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters' storages that are held; they exist anyway."""
        return sum(self._storages(of_parameters=True).values())

    @property
    def tensors(self) -> list[SavedTensor]:
        """Held tensors that are no parameters, in the order in which they were saved; storages may repeat."""
        held = sorted(self._packed, key=lambda packed: packed.order)
        kept = [packed.tensor for packed in held if not self._is_parameter(packed.tensor)]
        return [SavedTensor(tuple(t.shape), t.dtype, t.untyped_storage().nbytes()) for t in kept]

    def _storages(self, *, of_parameters: bool) -> dict[int, int]:
        held = (packed.tensor for packed in self._packed)
        return {
            _storage_key(tensor): tensor.untyped_storage().nbytes()
            for tensor in held
            if self._is_parameter(tensor) == of_parameters
        }

    def _is_parameter(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or _storage_key(tensor) in self._parameters

    def _pack(self, tensor: Tensor) -> _Packed:
        packed = _Packed(tensor, len(self._packed))
        self._packed.add(packed)
        return packed


class _Packed:
    """Handle that autograd keeps in the tensor's place, so that the tensor's release is seen."""

    def __init__(self, tensor: Tensor, order: int) -> None:
        self.tensor = tensor
        self.order = order


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def saved_bytes(*owners: nn.Module | Tensor) -> Iterator[SavedBytes]:
    """Watch what autograd saves inside the block; read the result while the graph is alive.

    Args:
        owners: modules whose parameters and buffers, and tensors whose storages, are not activations. An `nn.Parameter`
            is recognised by itself.

    Tensors that an `autograd.Function` keeps as plain attributes of `ctx` are invisible here; `LiveMemory` sees them.
    """
    found = SavedBytes(_tensors_of(owners))
    with torch.autograd.graph.saved_tensors_hooks(found._pack, lambda packed: packed.tensor):
        yield found


def _tensors_of(owners: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for owner in owners:
        if isinstance(owner, Tensor):
            yield owner
        else:
            yield from owner.parameters()
            yield from owner.buffers()


class LiveMemory:
    """Bytes of live tensors inside a `with` block, exact on every device, split by kind.

    Args:
        model: module, or list of modules, whose parameters and gradients are told apart.
        optimizer: anything with `.state`, or with `.optimizer.state`, as torch's and megatron's optimizers have.
        device_type: count tensors of this device type only.

    Attributes:
        peak: greatest number of bytes alive since entry or `reset_peak`.
        current: bytes alive now.
    """

    def __init__(self, model: Any = (), optimizer: Any = None, *, device_type: str | None = None) -> None:
        self._modules: list[nn.Module] = [model] if isinstance(model, nn.Module) else list(model)
        self._optimizer = optimizer
        self._meter = StorageMeter(device_type=device_type, kind_of=lambda func, tensor: "activation")

    def __enter__(self) -> LiveMemory:
        self._meter.__enter__()
        self._mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._meter.__exit__(kind, error, trace)

    @property
    def current(self) -> int:
        """Bytes alive now."""
        return self._meter.storages.current

    @property
    def peak(self) -> int:
        """Greatest number of bytes alive so far."""
        return self._meter.storages.peak

    def reset_peak(self) -> None:
        """Let the peak start from what is alive now."""
        self._meter.storages.reset_peak()

    def by_kind(self) -> dict[str, int]:
        """Bytes alive now as parameter, gradient, optimizer, activation (made inside the block) and other."""
        self._mark()
        found = self._meter.storages.by_kind()
        return {kind: found.get(kind, 0) for kind in ("parameter", "gradient", "optimizer", "activation", "other")}

    def _mark(self) -> None:
        storages = self._meter.storages
        parameters = [parameter for module in self._modules for parameter in module.parameters()]
        storages.mark(_state_tensors(self._optimizer), "optimizer")
        storages.mark((g for p in parameters for g in (p.grad, getattr(p, "main_grad", None)) if g is not None), "gradient")
        storages.mark(parameters, "parameter")


def _state_tensors(optimizer: Any) -> Iterator[Tensor]:
    if optimizer is None:
        return
    inner = getattr(optimizer, "chained_optimizers", None) or [optimizer]
    for one in inner:
        holder = one if hasattr(one, "state") else getattr(one, "optimizer", None)
        for state in getattr(holder, "state", {}).values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
