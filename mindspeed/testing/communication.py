"""Counter of collectives and point-to-point messages, and of the bytes that leave this rank.

    with count_communication() as counted:
        model(batch).backward()
    assert counted.calls("all_reduce", phase="backward") == 2 * layers
    assert counted.bytes(group=tp_group) == ...

The thread that opens the block is watched at the dispatcher (operators of `c10d` and `_c10d_functional`, whatever made the
call); other threads, an asynchronous save for instance, are watched at the methods of `ProcessGroup`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# kind of call -> operators of the dispatcher, with the argument that holds what is sent
_OPERATORS: dict[str, dict[str, str]] = {
    "all_reduce": {
        "c10d::allreduce_": "tensors",
        "c10d::allreduce_coalesced_": "tensors",
        "_c10d_functional::all_reduce": "input",
        "_c10d_functional::all_reduce_": "input",
        "_c10d_functional::all_reduce_coalesced": "inputs",
        "_c10d_functional::all_reduce_coalesced_": "inputs",
    },
    "all_gather": {
        "c10d::allgather_": "input_tensors",
        "c10d::allgather_coalesced_": "input_list",
        "c10d::_allgather_base_": "input_tensor",
        "c10d::allgather_into_tensor_coalesced_": "inputs",
        "_c10d_functional::all_gather_into_tensor": "input",
        "_c10d_functional::all_gather_into_tensor_out": "input",
        "_c10d_functional::all_gather_into_tensor_coalesced": "inputs",
    },
    "reduce_scatter": {
        "c10d::reduce_scatter_": "input_tensors",
        "c10d::_reduce_scatter_base_": "input_tensor",
        "c10d::reduce_scatter_tensor_coalesced_": "inputs",
        "_c10d_functional::reduce_scatter_tensor": "input",
        "_c10d_functional::reduce_scatter_tensor_out": "input",
        "_c10d_functional::reduce_scatter_tensor_coalesced": "inputs",
    },
    "all_to_all": {
        "c10d::alltoall_": "input_tensors",
        "c10d::alltoall_base_": "input",
        "_c10d_functional::all_to_all_single": "input",
    },
    "broadcast": {
        "c10d::broadcast_": "tensors",
        "_c10d_functional::broadcast": "input",
        "_c10d_functional::broadcast_": "input",
    },
    "reduce": {"c10d::reduce_": "tensors"},
    "gather": {"c10d::gather_": "input_tensors"},
    "scatter": {"c10d::scatter_": "input_tensors"},
    "send": {"c10d::send": "tensors", "_c10d_functional::isend": "tensor"},
    "recv": {"c10d::recv_": "tensors", "c10d::recv_any_source_": "tensors", "_c10d_functional::irecv": "tensor"},
    "barrier": {"c10d::barrier": "", "c10d::monitored_barrier_": ""},
}
_OPERATOR_KINDS = {name: (kind, payload) for kind, names in _OPERATORS.items() for name, payload in names.items()}

# method of ProcessGroup -> kind, position of what is handed over
COLLECTIVE_METHODS: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", -1),
    "monitored_barrier": ("barrier", -1),
}


def tensors_of_call(method: str, args: Sequence[Any]) -> list[Tensor]:
    """Tensors that a call of a `ProcessGroup` method hands over."""
    position = COLLECTIVE_METHODS[method][1]
    given = tree_leaves(args[position]) if 0 <= position < len(args) else []
    return [item for item in given if isinstance(item, Tensor)]


@dataclass(frozen=True)
class Communication:
    """One call of this rank.

    Attributes:
        kind: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `broadcast`, `reduce`, `gather`, `scatter`,
            `send`, `recv` or `barrier`.
        operator: the operator or method that was seen.
        group: name of the process group, as in `ProcessGroup.group_name`.
        size: ranks in the group.
        bytes: payload that leaves this rank.
        shapes: shapes of the tensors handed over.
        phase: "backward" inside autograd's backward (recomputation included), else "forward".
        thread: identifier of the calling thread.
    """

    kind: str
    operator: str
    group: str
    size: int
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    phase: str
    thread: int


class CommunicationCount:
    """What was seen; `records` is in order of the calls."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._dispatched: list[Communication] = []
        self._called: list[Communication] = []

    @property
    def records(self) -> list[Communication]:
        """Calls of the opening thread in order, then those of other threads."""
        return self._dispatched + [record for record in self._called if record.thread != self.thread]

    def select(
        self, kind: str | None = None, *, phase: str | None = None, group: ProcessGroup | str | None = None
    ) -> list[Communication]:
        """Records of one kind, phase and group; None takes all."""
        name = group.group_name if isinstance(group, ProcessGroup) else group
        return [
            record
            for record in self.records
            if kind in (None, record.kind) and phase in (None, record.phase) and name in (None, record.group)
        ]

    def calls(self, kind: str | None = None, *, phase: str | None = None, group: ProcessGroup | str | None = None) -> int:
        """Number of calls that `select` finds; without a kind, receives are left out since each belongs to a send."""
        return sum(kind is not None or record.kind != "recv" for record in self.select(kind, phase=phase, group=group))

    def bytes(self, kind: str | None = None, *, phase: str | None = None, group: ProcessGroup | str | None = None) -> int:
        """Payload that left this rank in the calls that `select` finds."""
        return sum(record.bytes for record in self.select(kind, phase=phase, group=group))

    def kinds(self) -> dict[str, int]:
        """Number of calls by kind."""
        return dict(Counter(record.kind for record in self.records))

    def views_agree(self) -> bool:
        """Whether dispatcher and `ProcessGroup` methods saw the same calls of the opening thread."""
        dispatched = [_essence(record) for record in self._dispatched if record.operator.startswith("c10d::")]
        return dispatched == [_essence(record) for record in self._called if record.thread == self.thread]


def _essence(record: Communication) -> tuple[str, str, int]:
    return record.kind, record.group, record.bytes


@contextlib.contextmanager
def count_communication() -> Iterator[CommunicationCount]:
    """Count everything that this process sends and receives inside the block."""
    counted = CommunicationCount()
    with _watched_methods(counted._called.append), _DispatchWatch(counted._dispatched.append):
        yield counted


class _DispatchWatch(TorchDispatchMode):
    """Reports communication operators of the thread that entered it."""

    def __init__(self, report: Callable[[Communication], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _OPERATOR_KINDS:
            names = (argument.name for argument in func._schema.arguments)
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            kind, payload = _OPERATOR_KINDS[name]
            sent = tree_leaves(given[payload]) if payload else []
            splits = given.get("input_split_sizes") or ()
            self._report(_record(kind, name, _group_of(given), sent, splits, given.get("root_rank", given.get("src"))))
        elif name == "_c10d_functional::batch_p2p_ops":
            self._batch(name, *args)
        return func(*args, **(kwargs or {}))

    def _batch(self, name: str, verbs: Sequence[str], peers: Any, tags: Any, tensors: Sequence[Tensor], group: str) -> None:
        for verb, tensor in zip(verbs, tensors, strict=True):
            kind = "send" if "send" in verb else "recv"
            self._report(_record(kind, name, _group_of({"group_name": group}), [tensor]))


@contextlib.contextmanager
def _watched_methods(report: Callable[[Communication], None]) -> Iterator[None]:
    """Report calls of `ProcessGroup`'s methods by any thread."""
    # taken from __dict__: getattr would unwrap the C++ methods, and what is put back could not be bound any more
    originals = {name: ProcessGroup.__dict__[name] for name in COLLECTIVE_METHODS if name in ProcessGroup.__dict__}

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        kind = COLLECTIVE_METHODS[name][0]

        def method(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            sent = tensors_of_call(name, args)
            splits = args[3] if name in ("alltoall_base", "all_to_all_single") and len(args) > 3 else ()
            report(_record(kind, name, group, sent, splits, _root_of(args, kwargs)))
            return original(group, *args, **kwargs)

        return method

    for name in originals:
        setattr(ProcessGroup, name, watch(name, getattr(ProcessGroup, name)))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def _root_of(args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    roots = [option.rootRank for option in (*args, *kwargs.values()) if hasattr(option, "rootRank")]
    return roots[0] if roots else kwargs.get("root")


def _group_of(given: dict[str, Any]) -> ProcessGroup:
    if (boxed := given.get("process_group")) is not None:
        return ProcessGroup.unbox(boxed)
    name = given["group_name"]
    return dist.distributed_c10d._resolve_process_group(name) if isinstance(name, str) else name


def _record(
    kind: str, operator: str, group: ProcessGroup, sent: list[Any], splits: Sequence[int] = (), root: int | None = None
) -> Communication:
    tensors = [item for item in sent if isinstance(item, Tensor)]
    return Communication(
        kind=kind,
        operator=operator,
        group=group.group_name,
        size=group.size(),
        bytes=_bytes_leaving(kind, tensors, group, list(splits), root),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        phase="forward" if torch._C._current_autograd_node() is None else "backward",
        thread=threading.get_ident(),
    )


def _bytes_leaving(kind: str, tensors: list[Tensor], group: ProcessGroup, splits: list[int], root: int | None) -> int:
    """Payload that leaves this rank with the bandwidth-optimal algorithm of each collective.

    With k ranks: all-reduce 2 (k-1)/k n, all-gather (k-1) n, reduce-scatter and all-to-all (k-1)/k n, where n are the
    bytes handed over; exact for uneven all-to-all. Broadcast counts n at the root, reduce and gather n at the others,
    scatter (k-1)/k n at the root.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    size, rank = group.size(), group.rank()
    if kind == "all_to_all":
        return total - _kept_bytes(tensors, rank, size, splits)
    portions = {
        "all_reduce": 2 * total * (size - 1) // size,
        "all_gather": total * (size - 1),
        "reduce_scatter": total * (size - 1) // size,
        "broadcast": total if rank == root and size > 1 else 0,
        "reduce": 0 if rank == root else total,
        "gather": 0 if rank == root else total,
        "scatter": total * (size - 1) // size if rank == root else 0,
        "send": total,
    }
    return portions.get(kind, 0)


def _kept_bytes(tensors: list[Tensor], rank: int, size: int, splits: list[int]) -> int:
    """Bytes of an all-to-all that stay on this rank."""
    if len(tensors) == size and not splits and size > 1:
        return tensors[rank].nbytes
    (tensor,) = tensors
    if not splits:
        return tensor.nbytes // size
    rows = tensor.shape[0]
    return tensor.nbytes * splits[rank] // rows if rows else 0
