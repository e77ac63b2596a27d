"""Ring attention: every rank keeps its queries, keys and values travel round (arXiv 2310.01889), balanced by zigzag.

With a window w the ring is double: keys and values hop round windows of w ranks while the buffer that a window
started with goes to the next window. w = 1 is the plain ring. Backward starts from the block that forward held last
and goes the other way, with the gradients of keys and values travelling along, so that they arrive home with the
last step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.attention import Accumulator, GradientSum, merge_fused, merge_into
from mindspeed.core.context_parallel.exchange import Exchange, Incoming, Packed
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.work import AttentionOptions, Work, backward_block, forward_block, plan_work

INNER, OUTER, GRADIENT = 1, 2, 3  # message tags of transfers that are open at the same time


@dataclass(frozen=True)
class Step:
    """One step of a ring pass: the block at hand, and what has to be under way meanwhile."""

    block: int
    send_inner: bool  # pass the current buffer on inside the window
    send_outer: bool  # pass the buffer at hand to the next window; used when the window is done
    take_outer: bool  # continue with the buffer that came from the other window


@dataclass(frozen=True)
class RingRoute:
    """Who talks to whom in a ring of `ranks` with windows of `window`, in one direction (+1 forward, -1 backward)."""

    rank: int
    ranks: int
    window: int = 1
    direction: int = 1

    def steps(self) -> Iterator[Step]:
        """Blocks in the order of visit."""
        start = 0 if self.direction == 1 else 1
        for outer in range(self.ranks // self.window):
            for inner in range(self.window):
                last_inner, last_outer = inner == self.window - 1, outer == self.ranks // self.window - 1
                yield Step(
                    block=self._at(-self.direction * (outer + start), -self.direction * (inner + start)),
                    send_inner=not last_inner,
                    send_outer=inner == 0 and not last_outer,
                    take_outer=last_inner and not last_outer,
                )

    @property
    def inner_to(self) -> int:
        """Receiver of buffers inside the window."""
        return self._at(0, self.direction)

    @property
    def inner_from(self) -> int:
        """Sender of buffers inside the window."""
        return self._at(0, -self.direction)

    @property
    def outer_to(self) -> int:
        """Receiver of buffers in the next window."""
        return self._at(self.direction, 0)

    @property
    def outer_from(self) -> int:
        """Sender of buffers in the previous window."""
        return self._at(-self.direction, 0)

    @property
    def gradient_to(self) -> int:
        """Receiver of key and value gradients when the window is done."""
        return self._at(self.direction, self.direction)

    @property
    def gradient_from(self) -> int:
        """Sender of key and value gradients when the window is done."""
        return self._at(-self.direction, -self.direction)

    def _at(self, windows: int, places: int) -> int:
        """Rank that many windows and places further."""
        outer, inner = divmod(self.rank, self.window)
        return (outer + windows) % (self.ranks // self.window) * self.window + (inner + places) % self.window


@dataclass(frozen=True)
class RingContext:
    """Groups and options of ring attention.

    Attributes:
        exchange: transfers round the whole ring.
        inner: transfers inside a window (the same unless a group of its own exists).
        rank: place in the ring.
        window: ranks per window.
        cache: "none", "full" (keep all received keys and values for backward) or "half" (keep keys only):
            less traffic for more memory.
        fused_update: merge partial results with one kernel of the device.
        gradient_dtype: of the gradients of keys and values on their way; None is that of the statistics, fp32.
    """

    exchange: Exchange
    rank: int
    layout: SequenceLayout
    options: AttentionOptions
    inner: Exchange | None = None
    window: int = 1
    cache: str = "none"
    fused_update: bool = False
    gradient_dtype: torch.dtype | None = None

    def route(self, direction: int) -> RingRoute:
        """Route of a forward (+1) or backward (-1) pass."""
        return RingRoute(self.rank, self.layout.ring, self.window, direction)

    def work(self, block: int, batch: int) -> tuple[Work, ...]:
        """Tiles between this rank's queries and a block."""
        return plan_work(self.layout, self.rank, block, batch, self.options)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, context: RingContext) -> Tensor:
    """Attention over a sequence whose blocks live on the ranks of a ring; differentiable in q, k and v.

    Args:
        q: [B, N, s, D] with s = S / R; k: [B, G, s, D]; v: [B, G, s, Dv]. Same shapes on all ranks.

    Returns:
        [B, N, s, Dv] in q's dtype.
    """
    return _RingAttention.apply(q, k, v, context)


class _Hop:
    """Buffers on their way through a ring pass; open transfers end when their `ExitStack` closes."""

    def __init__(self, context: RingContext, direction: int, flat: Tensor, *, keeps: bool) -> None:
        """Start with the buffer `flat`, which stays as it is; `keeps` says that the caller keeps all others too."""
        self.route = context.route(direction)
        self.outer_exchange, self.inner_exchange = context.exchange, context.inner or context.exchange
        self.flat = flat
        self._kept = None if keeps else flat
        self._spare: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[Step, Tensor]]:
        """Yield each step with the buffer at hand; transfers to the next step run while the caller computes."""
        outer_stack, outer, leaving = ExitStack(), None, None
        route = self.route
        for step in route.steps():
            if step.send_outer:
                leaving = self.flat
                outer = outer_stack.enter_context(
                    self.outer_exchange.passing(
                        leaving, to=route.outer_to, source=route.outer_from, tag=OUTER, room=self._room()
                    )
                )
            with ExitStack() as inner_stack:
                inner = None
                if step.send_inner:
                    inner = inner_stack.enter_context(
                        self.inner_exchange.passing(
                            self.flat, to=route.inner_to, source=route.inner_from, tag=INNER, room=self._room()
                        )
                    )
                yield step, self.flat
            if inner is not None:
                if self.flat is not leaving:  # the transfer to the next window still reads that one
                    self._release(self.flat)
                self.flat = inner.tensor
            if step.take_outer and outer is not None:
                outer_stack.close()
                self._release(self.flat)
                if leaving is not self.flat:
                    self._release(leaving)
                self.flat, leaving = outer.tensor, None

    def _release(self, flat: Tensor) -> None:
        """Nobody reads this buffer any more: the next message may land there, in memory that is warm."""
        if self._kept is not None and flat is not self._kept:
            self._spare.append(flat)

    def _room(self) -> Tensor | None:
        return self._spare.pop() if self._spare else None


class _RingAttention(torch.autograd.Function):
    """Saves q, the block that forward held last (or all that were received), out and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, context: RingContext) -> Tensor:
        buffer = Packed.of(k, v)
        total = Accumulator(q, v.shape[-1], merge_fused if context.fused_update else merge_into)
        states: dict[int, list[object]] = {}
        kept: dict[int, Tensor] = {}
        last = buffer.flat
        for step, flat in _Hop(context, 1, buffer.flat, keeps=context.cache == "full"):
            key, value = buffer.split(flat)
            states[step.block] = forward_block(q, key, value, context.work(step.block, q.shape[0]), total)
            last = flat
            if context.cache != "none":
                # A view would keep the whole message alive.
                kept[step.block] = flat if context.cache == "full" else key.flatten().clone()
        out = total.out.to(q.dtype)
        carried = last if context.cache == "none" else buffer.split(last)[1].flatten().clone()
        ctx.save_for_backward(q, out, total.lse, carried, *kept.values())
        ctx.context, ctx.buffer_shapes, ctx.states, ctx.kept_blocks = context, buffer.shapes, states, tuple(kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, out, lse, carried, *kept = ctx.saved_tensors
        context: RingContext = ctx.context
        dq = GradientSum(q)
        shapes = ctx.buffer_shapes
        gradient = _TravellingGradient(context, Packed(shapes, q.new_empty(0, dtype=context.gradient_dtype or lse.dtype)))
        for step, key, value in _blocks_backward(ctx, carried, dict(zip(ctx.kept_blocks, kept, strict=True))):
            work = context.work(step.block, q.shape[0])
            parts = backward_block((grad_out, q, out, lse), key, value, work, ctx.states[step.block], dq)
            gradient.add(step, parts)
        dk, dv = gradient.home
        return dq.total.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None


def _blocks_backward(ctx: Any, carried: Tensor, kept: dict[int, Tensor]) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Blocks in backward order, from the cache where there is one, else by transfer."""
    context: RingContext = ctx.context
    key_shape, value_shape = ctx.buffer_shapes
    size = key_shape.numel()
    if context.cache == "full":
        for step in context.route(-1).steps():
            flat = kept[step.block]
            yield step, flat[:size].view(key_shape), flat[size:].view(value_shape)
        return
    for step, flat in _Hop(context, -1, carried, keeps=False):
        if context.cache == "half":
            yield step, kept[step.block].view(key_shape), flat.view(value_shape)
        else:
            yield step, flat[:size].view(key_shape), flat[size:].view(value_shape)


class _TravellingGradient:
    """Gradients of keys and values that follow their block back to its owner, summed where they arrive."""

    def __init__(self, context: RingContext, form: Packed) -> None:
        """Start with nothing; `form` has the shapes of keys and values and the dtype of the messages."""
        self.route = context.route(-1)
        self.context = context
        self.form = form
        self.home: list[Tensor] = []
        self._stack = ExitStack()
        self._incoming: Incoming | None = None
        self._sent: Tensor | None = None

    def add(self, step: Step, own: tuple[GradientSum, GradientSum]) -> None:
        """Add this rank's part for the block at hand and send the sum after the block."""
        flat, spare = self._arrived(own)
        route, exchange = self.route, self.context.exchange
        if step.send_inner:
            exchange = self.context.inner or exchange
            to, source = route.inner_to, route.inner_from
        elif step.take_outer:
            to, source = route.gradient_to, route.gradient_from
        else:
            self.home = self.form.split(flat)
            return
        self._incoming = self._stack.enter_context(exchange.passing(flat, to=to, source=source, tag=GRADIENT, room=spare))
        self._sent = flat

    def _arrived(self, own: tuple[GradientSum, GradientSum]) -> tuple[Tensor, Tensor | None]:
        """The block's sum so far with this rank's part in it, and the buffer whose transfer is over."""
        if self._incoming is None:
            flat = self.form.flat.new_empty(sum(shape.numel() for shape in self.form.shapes))
            for room, part in zip(self.form.split(flat), own, strict=True):
                part.write_to(room)
            return flat, None
        self._stack.close()
        flat = self._incoming.tensor
        for room, part in zip(self.form.split(flat), own, strict=True):
            part.add_to(room)
        return flat, self._sent
