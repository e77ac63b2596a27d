"""How many bytes of tensors are alive: an exact meter for a block of code, and a cheap census between blocks.

The meter is a dispatch mode that keeps a weak reference to every storage it sees, so it knows the current and the
peak bytes exactly, including what autograd saved for backward. It costs several microseconds per operation and is
therefore on only when asked for. Without it, a question for the current bytes walks the tensors that Python objects
own (parameters, gradients, optimizer state, what modules hold); the peak is then the greatest answer given so far.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class _Entry:
    reference: weakref.ref[torch.UntypedStorage]
    nbytes: int
    kind: str


class LiveStorages:
    """Registry of storages that are alive, with their current and peak bytes.

    Attributes:
        current: bytes alive now.
        peak: greatest value of `current` since construction or `reset_peak`.
    """

    def __init__(self, device_type: str | None = None) -> None:
        self._device_type = device_type
        self._entries: dict[int, _Entry] = {}
        self.current = 0
        self.peak = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, tensor: torch.Tensor, kind: str = "other") -> None:
        """Start to follow the storage behind `tensor`; a storage known already keeps its kind."""
        storage = _storage_of(tensor, self._device_type)
        if storage is None:
            return
        key = storage._cdata
        if entry := self._entries.get(key):
            self._account(entry, storage.nbytes())
            return
        reference = weakref.ref(storage, self._forget(key))
        entry = self._entries[key] = _Entry(reference, 0, kind)
        self._account(entry, storage.nbytes())

    def mark(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say what these tensors are: parameter, gradient, optimizer, activation, ..."""
        for tensor in tensors:
            self.add(tensor, kind)
            storage = _storage_of(tensor, self._device_type)
            if storage is not None:
                self._entries[storage._cdata].kind = kind

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Take note that a storage has been resized in place."""
        if entry := self._entries.get(storage._cdata):
            self._account(entry, storage.nbytes())

    def reset_peak(self) -> None:
        """Let the peak start from what is alive now."""
        self.peak = self.current

    def by_kind(self) -> dict[str, int]:
        """Bytes alive now, by kind."""
        totals: dict[str, int] = {}
        for entry in self._entries.values():
            totals[entry.kind] = totals.get(entry.kind, 0) + entry.nbytes
        return totals

    def _account(self, entry: _Entry, nbytes: int) -> None:
        self.current += nbytes - entry.nbytes
        entry.nbytes = nbytes
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int) -> Callable[[Any], None]:
        owner = weakref.ref(self)  # a storage may outlive its meter

        def on_death(reference: Any) -> None:
            live = owner()
            if live is not None and (entry := live._entries.get(key)) and entry.reference is reference:
                del live._entries[key]
                live.current -= entry.nbytes

        return on_death


class StorageMeter(TorchDispatchMode):
    """Follow every storage that operations make or touch inside a `with` block, and those alive at its start.

    Args:
        storages: registry to fill; a fresh one by default.
        device_type: count only tensors of this device type; all real devices by default.
        kind_of: says what a new tensor is, given the operator and the tensor; "other" by default.
    """

    def __init__(
        self,
        storages: LiveStorages | None = None,
        *,
        device_type: str | None = None,
        kind_of: Callable[[Any, torch.Tensor], str] | None = None,
    ) -> None:
        super().__init__()
        self.storages = LiveStorages(device_type) if storages is None else storages
        self._kind_of = kind_of
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> StorageMeter:
        for tensor in tensors_of_python():
            self.storages.add(tensor)
        self.storages.reset_peak()
        self._restore = _watch_resizes(self.storages)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        self._restore()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then register what it returned."""
        outputs = func(*args, **(kwargs or {}))
        for leaf in (outputs,) if isinstance(outputs, torch.Tensor) else tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self.storages.add(leaf, self._kind_of(func, leaf) if self._kind_of else "other")
        return outputs


def _watch_resizes(storages: LiveStorages) -> Callable[[], None]:
    """Report `UntypedStorage.resize_`, which no dispatch mode sees; returns what undoes it."""
    original = torch.UntypedStorage.resize_
    own = torch.UntypedStorage.__dict__.get("resize_")

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        storages.resized(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]

    def restore() -> None:
        if own is None:
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = own  # type: ignore[method-assign]

    return restore


def tensors_of_python() -> Iterator[torch.Tensor]:
    """Tensors that Python objects hold, and gradients; not those that autograd alone keeps for backward."""
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.Tensor):
            yield candidate
            if candidate.is_leaf and candidate.grad is not None:  # backward makes .grad without a Python object
                yield candidate.grad


def live_storages(device_type: str | None = None) -> list[int]:
    """Bytes of each storage behind the tensors that Python objects hold; shared storages count once."""
    sizes = {}
    for tensor in tensors_of_python():
        storage = _storage_of(tensor, device_type)
        if storage is not None:
            sizes[storage._cdata] = storage.nbytes()
    return list(sizes.values())


def _storage_of(tensor: torch.Tensor, device_type: str | None) -> torch.UntypedStorage | None:
    """Storage of a tensor that occupies memory on a counted device, else None."""
    found = tensor.device.type
    if found == "meta" or (device_type is not None and found != device_type):
        return None
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors, wrapper subclasses, functorch levels
        return None
    return None if storage.device.type == "meta" else storage


class Reading(NamedTuple):
    """Bytes of live tensors now and at most since the last reset, and the number of storages they are in."""

    current: int
    peak: int
    storages: int


class LiveMemoryCounter:
    """Current and peak bytes of live tensors in this process: exact while metering, a census otherwise."""

    def __init__(self, device_type: str | None = None) -> None:
        self._device_type = device_type
        self._meter: LiveStorages | None = None
        self._peak = 0

    @contextlib.contextmanager
    def metering(self) -> Iterator[LiveStorages]:
        """Count exactly inside the block."""
        outer = self._meter
        with StorageMeter(device_type=self._device_type) as meter:
            self._meter = meter.storages
            try:
                yield meter.storages
            finally:
                self._peak = max(self._peak, meter.storages.peak)
                self._meter = outer

    def read(self) -> Reading:
        """Count now; this is one of the moments that the peak is taken from."""
        if self._meter is None:
            sizes = live_storages(self._device_type)
            current, count, peak = sum(sizes), len(sizes), 0
        else:
            current, count, peak = self._meter.current, len(self._meter), self._meter.peak
        self._peak = max(self._peak, current, peak)
        return Reading(current, self._peak, count)

    def reset_peak(self) -> None:
        """Let the peak start from what is alive now."""
        if self._meter is not None:
            self._meter.reset_peak()
        self._peak = 0
        self.read()


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def resident_peak_bytes() -> int:
    """Greatest `resident_bytes` of this process so far."""
    if os.name == "nt":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes elsewhere
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, resident_bytes())
