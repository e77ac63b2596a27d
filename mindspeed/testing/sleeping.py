"""Compute that sleeps: on two cores, many ranks then behave like as many devices, and wall time is the schedule's.

    stage = SleepingStage(forward_seconds=0.03, input_seconds=0.03, weight_seconds=0.03)
    with delayed_links(latency=0.01, bytes_per_second=1e9):
        run_schedule(stage)

Everything else is real: autograd, buffers, messages. A wake-up is late by less than 0.3 ms on an idle machine, so
with 20 ms or more a stage the measured time is the schedule's makespan.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map

from mindspeed.testing.communication import COLLECTIVE_METHODS, tensors_of_call


class _SleepInBackward(torch.autograd.Function):
    """Identity whose backward sleeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, name: str, tell: Callable[[str], None]) -> Tensor:
        ctx.seconds, ctx.name, ctx.tell = seconds, name, tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.tell(ctx.name)
        time.sleep(ctx.seconds)
        return grad, None, None, None


class SleepingStage(nn.Module):
    """y = x + w, where forward and the gradients of x and of w sleep in nodes of their own.

    The gradient of x passes a node on the activation path and that of w one on the parameter path, so that schedules
    which split the backward pass split the sleep too.

    Args:
        forward_seconds, input_seconds, weight_seconds: how long each part sleeps.
        tell: called with "F", "I" or "W" when a part begins, to log the order.
    """

    def __init__(
        self,
        forward_seconds: float,
        input_seconds: float,
        weight_seconds: float,
        tell: Callable[[str], None] = lambda part: None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.forward_seconds = forward_seconds
        self.input_seconds = input_seconds
        self.weight_seconds = weight_seconds
        self.tell = tell

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: any shape."""
        self.tell("F")
        time.sleep(self.forward_seconds)
        through = _SleepInBackward.apply(x, self.input_seconds, "I", self.tell)
        return through + _SleepInBackward.apply(self.weight, self.weight_seconds, "W", self.tell)


class HeldWork:
    """Handle of a delayed transfer; what schedules use of `torch.distributed.Work`."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self, timeout: Any = None) -> bool:
        """Block until the transfer is over; raises what it raised."""
        self._future.result(timeout.total_seconds() if hasattr(timeout, "total_seconds") else timeout)
        return True

    def is_completed(self) -> bool:
        """Whether the transfer is over."""
        return self._future.done()

    def is_success(self) -> bool:
        """Whether it is over without error."""
        return self._future.done() and self._future.exception() is None

    def exception(self) -> BaseException | None:
        """Its error, once it is over."""
        return self._future.exception() if self._future.done() else None


class _Lanes:
    """One worker thread for each link (group and peer) or group, so that order is kept on each."""

    def __init__(self, latency: float, bytes_per_second: float) -> None:
        self._latency = latency
        self._seconds_per_byte = 1 / bytes_per_second
        self._lock = threading.Lock()
        self._threads: dict[Any, ThreadPoolExecutor] = {}
        self._free_at: dict[Any, float] = defaultdict(float)

    def submit(self, lane: Any, nbytes: int, transfer: Callable[[], Any], *, held_before: bool) -> HeldWork:
        """Run `transfer` when the link would have delivered `nbytes`; `held_before` says that it makes the data visible."""
        occupied = nbytes * self._seconds_per_byte
        with self._lock:
            begins = max(time.perf_counter(), self._free_at[lane])
            self._free_at[lane] = begins + occupied
            thread = self._threads.setdefault(lane, ThreadPoolExecutor(1, thread_name_prefix=f"link {lane}"))
        due = begins + occupied + self._latency

        def deliver() -> None:
            if not held_before:
                transfer().wait()
            time.sleep(max(0.0, due - time.perf_counter()))
            if held_before:
                transfer().wait()

        return HeldWork(thread.submit(deliver))

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=True)


@contextlib.contextmanager
def delayed_links(latency: float, bytes_per_second: float = float("inf")) -> Iterator[None]:
    """Hold every message and collective of this process for `latency + bytes / bytes_per_second` seconds.

    A message is held at the sender, which may go on; messages to the same peer queue up. A collective ends that much
    later on every rank. Data is copied when it is sent, so the sender may reuse its buffer after `wait` as usual.
    Enter the block on all ranks. Functional collectives (`_c10d_functional`) pass undelayed.
    """
    lanes = _Lanes(latency, bytes_per_second)
    methods = {
        name: ProcessGroup.__dict__[name]
        for name, (kind, _) in COLLECTIVE_METHODS.items()
        if name in ProcessGroup.__dict__ and kind not in ("recv", "barrier")
    }
    for name in methods:
        setattr(ProcessGroup, name, _delayed(lanes, name, getattr(ProcessGroup, name)))
    try:
        yield
    finally:
        lanes.close()
        for name, original in methods.items():
            setattr(ProcessGroup, name, original)


def _delayed(lanes: _Lanes, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def send(group: ProcessGroup, *args: Any, **kwargs: Any) -> HeldWork:
        nbytes = sum(tensor.nbytes for tensor in tensors_of_call(name, args))
        copies = tree_map(lambda item: item.detach().clone() if isinstance(item, Tensor) else item, args)
        lane = group.group_name, args[1] if len(args) > 1 else kwargs.get("dst")
        return lanes.submit(lane, nbytes, lambda: original(group, *copies, **kwargs), held_before=True)

    def collective(group: ProcessGroup, *args: Any, **kwargs: Any) -> HeldWork:
        nbytes = sum(tensor.nbytes for tensor in tensors_of_call(name, args))
        lane = group.group_name, "collectives"
        return lanes.submit(lane, nbytes, lambda: original(group, *args, **kwargs), held_before=False)

    return send if name == "send" else collective
