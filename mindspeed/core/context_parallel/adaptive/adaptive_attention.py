"""Attention by a schedule of tiles: what a round needs travels while the round before is computed.

Forward: a device fetches keys and values, or borrows queries and returns (out, log-sum-exp). Backward replays the
schedule with the global result: a fetched tile returns dK and dV to the keys' owner, a helped tile takes the queries with
their out, dout and log-sum-exp and returns dQ. Owners add what comes back in the order of ranks, so that results repeat.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.attention import Accumulator, GradientSum
from mindspeed.core.attention.contract import statistics_dtype
from mindspeed.core.context_parallel.adaptive.schedule import Round, Task
from mindspeed.core.context_parallel.exchange import Mailbox, Packed, Pending
from mindspeed.core.context_parallel.work import Work, backward_block, forward_block


@dataclass(frozen=True)
class AdaptivePlan:
    """One attention call on this device.

    Attributes:
        rounds: the schedule.
        rank, ranks: place among the devices.
        mailbox: transfers between them.
        work_of: task -> kernel calls of its tile.
        gradient_dtype: of the gradients of keys and values on their way; None is that of the statistics, fp32.
    """

    rounds: tuple[Round, ...]
    rank: int
    ranks: int
    mailbox: Mailbox
    work_of: Callable[[Task], tuple[Work, ...]]
    gradient_dtype: torch.dtype | None = None

    def mine(self, number: int) -> Task | None:
        """This device's task of a round."""
        return next((task for task in self.rounds[number] if task.device == self.rank), None)

    def tag(self, number: int, kind: int, sender: int) -> int:
        """Tag of a message; unique among those that may be open. Kinds 0 and 1 are inputs, 2 and 3 results."""
        return (number * 4 + kind) * self.ranks + sender


def adaptive_attention(q: Tensor, k: Tensor, v: Tensor, plan: AdaptivePlan) -> Tensor:
    """Attention of [b, n, s, d] queries over a sequence shared out in blocks; differentiable.

    Args:
        k: [b, g, s, d]; v: [b, g, s, dv].

    Returns:
        [b, n, s, dv] in q's dtype.
    """
    return _AdaptiveAttention.apply(q, k, v, plan)


class _Pass(ABC):
    """The common shape of forward and backward: inputs one round ahead, results one round behind."""

    def __init__(self, plan: AdaptivePlan) -> None:
        self.plan = plan

    def run(self) -> None:
        """Compute all rounds."""
        plan = self.plan
        inputs = self._post_inputs(0)
        owed: tuple[Tensor, ...] = ()
        for number in range(len(plan.rounds)):
            received = inputs.wait()
            inputs = self._post_inputs(number + 1)
            returning = self._post_results(number - 1, owed)
            task = plan.mine(number)
            owed = () if task is None else self.compute(task, received)
            self._collect(*returning)
        inputs.wait()
        self._collect(*self._post_results(len(plan.rounds) - 1, owed))

    def _post_inputs(self, number: int) -> Pending:
        """Start what a round's tasks need; the caller waits for it."""
        plan, batch = self.plan, self.plan.mailbox.batch()
        for task in plan.rounds[number] if number < len(plan.rounds) else ():
            owner = task.column if task.kind == "fetch" else task.row
            if task.kind == "local" or plan.rank not in (owner, task.device):
                continue
            for kind, tensor in enumerate(self.inputs(task.kind)):
                tag = plan.tag(number, kind, owner)
                if plan.rank == owner:
                    batch.send(tensor, task.device, tag)
                else:  # blocks are equally long on all devices
                    batch.receive(torch.empty_like(tensor), owner, tag)
        return batch.start()

    def _post_results(self, number: int, owed: tuple[Tensor, ...]) -> tuple[Pending, list[Task]]:
        """Start the return of a round's results, in the order of the devices that computed them."""
        plan, batch, coming = self.plan, self.plan.mailbox.batch(), []
        for task in plan.rounds[number] if number >= 0 else ():
            owner = self.owner_of_result(task)
            if owner is None:
                continue
            if plan.rank == task.device:
                for kind, tensor in enumerate(owed):
                    batch.send(tensor, owner, plan.tag(number, 2 + kind, task.device))
            elif plan.rank == owner:
                coming.append(task)
                for kind, tensor in enumerate(self.result_buffers(task)):
                    batch.receive(tensor, task.device, plan.tag(number, 2 + kind, task.device))
        return batch.start(), coming

    def _collect(self, pending: Pending, coming: list[Task]) -> None:
        received = pending.wait()
        for task in coming:
            count = len(self.result_buffers(task))
            self.collect(task, received[:count])
            received = received[count:]

    @abstractmethod
    def inputs(self, kind: str) -> tuple[Tensor, ...]:
        """What the owner sends for a task of this kind (at most two messages)."""

    @abstractmethod
    def compute(self, task: Task, received: list[Tensor]) -> tuple[Tensor, ...]:
        """Compute a task; what must be returned to the owner of its result."""

    @abstractmethod
    def owner_of_result(self, task: Task) -> int | None:
        """Another device that gets a task's result back, or None."""

    @abstractmethod
    def result_buffers(self, task: Task) -> tuple[Tensor, ...]:
        """Empty tensors of the form of a returned result."""

    @abstractmethod
    def collect(self, task: Task, results: list[Tensor]) -> None:
        """Add a returned result to what this device owns."""


class _Forward(_Pass):
    def __init__(self, plan: AdaptivePlan, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().__init__(plan)
        self.q, self.keys = q, Packed.of(k, v)
        self.total = Accumulator(q, v.shape[-1])
        self.states: dict[Task, list[object]] = {}

    def inputs(self, kind: str) -> tuple[Tensor, ...]:
        return (self.keys.flat,) if kind == "fetch" else (self.q.contiguous(),)

    def compute(self, task: Task, received: list[Tensor]) -> tuple[Tensor, ...]:
        work = self.plan.work_of(task)
        if task.kind == "help":
            result = Accumulator(received[0], self.keys.shapes[1][-1])
            self.states[task] = forward_block(received[0], *self.keys.split(self.keys.flat), work, result)
            return result.out.to(result.lse.dtype).contiguous(), result.lse.contiguous()
        flat = received[0] if task.kind == "fetch" else self.keys.flat
        self.states[task] = forward_block(self.q, *self.keys.split(flat), work, self.total)
        return ()

    def owner_of_result(self, task: Task) -> int | None:
        return task.row if task.kind == "help" else None

    def result_buffers(self, task: Task) -> tuple[Tensor, ...]:
        rows, dtype = self.q.shape[:-1], statistics_dtype(self.q.dtype)
        return self.q.new_empty((*rows, self.keys.shapes[1][-1]), dtype=dtype), self.q.new_empty(rows, dtype=dtype)

    def collect(self, task: Task, results: list[Tensor]) -> None:
        self.total.add(*results)


class _Backward(_Pass):
    def __init__(self, plan: AdaptivePlan, saved: tuple[Tensor, ...], states: dict[Task, list[object]]) -> None:
        super().__init__(plan)
        self.grad_out, self.q, k, v, self.out, self.lse = saved
        self.keys, self.queries = Packed.of(k, v), Packed.of(self.q, self.grad_out, self.out)
        self.states = states
        self.dq = GradientSum(self.q)
        self.dkv = torch.zeros_like(self.keys.flat, dtype=self.lse.dtype)
        self.own = self.keys.split(self.dkv)

    def inputs(self, kind: str) -> tuple[Tensor, ...]:
        return (self.keys.flat,) if kind == "fetch" else (self.queries.flat, self.lse)

    def compute(self, task: Task, received: list[Tensor]) -> tuple[Tensor, ...]:
        work, states = self.plan.work_of(task), self.states[task]
        if task.kind == "help":
            q, grad_out, out = self.queries.split(received[0])
            dq = GradientSum(q)
            key, value = self.keys.split(self.keys.flat)
            self._keep(backward_block((grad_out, q, out, received[1]), key, value, work, states, dq))
            return (dq.total.to(self.lse.dtype).contiguous(),)
        key, value = self.keys.split(received[0] if task.kind == "fetch" else self.keys.flat)
        parts = backward_block((self.grad_out, self.q, self.out, self.lse), key, value, work, states, self.dq)
        if task.kind == "fetch":
            (message,) = self.result_buffers(task)
            for room, part in zip(self.keys.split(message), parts, strict=True):
                part.write_to(room)
            return (message,)
        self._keep(parts)
        return ()

    def owner_of_result(self, task: Task) -> int | None:
        return {"local": None, "fetch": task.column, "help": task.row}[task.kind]

    def result_buffers(self, task: Task) -> tuple[Tensor, ...]:
        if task.kind == "fetch":
            return (torch.empty_like(self.dkv, dtype=self.plan.gradient_dtype),)
        return (self.q.new_empty(self.q.shape, dtype=self.lse.dtype),)

    def collect(self, task: Task, results: list[Tensor]) -> None:
        if task.kind == "fetch":
            self.dkv += results[0]
        else:
            self.dq.add(results[0])

    def _keep(self, parts: tuple[GradientSum, GradientSum]) -> None:
        """Add to the gradients of this device's keys and values."""
        for room, part in zip(self.own, parts, strict=True):
            part.add_to(room)


class _AdaptiveAttention(torch.autograd.Function):
    """Saves q, k, v, out and the log-sum-exp, and what each task's kernel needs of its random state."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AdaptivePlan) -> Tensor:
        forward = _Forward(plan, q, k, v)
        forward.run()
        out = forward.total.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, forward.total.lse.contiguous())
        ctx.plan, ctx.states = plan, forward.states
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        backward = _Backward(ctx.plan, (grad_out, q, k, v, out, lse), ctx.states)
        backward.run()
        dk, dv = backward.keys.split(backward.dkv)
        return backward.dq.total.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
