"""Fused attention on CPU: `aten::_scaled_dot_product_flash_attention_for_cpu` and its backward.

Facts that this file guards against (torch 2.7 to 2.13): an empty query or key range kills the process
(the dispatcher never passes one); a fully masked row gets a log-sum-exp of 0 instead of -inf; boolean masks are
refused; dropout and a value head size other than the query's are refused; the last dimension is read as if its
stride were 1, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed.core.attention.contract import Scoring, Visibility, statistics_dtype
from mindspeed.core.attention.math_kernel import masked_parts
from mindspeed.core.attention.merge import Accumulator, GradientSum

ROWS = 256  # rows per call where a mask tensor has to be built: bounds it to 256 x keys
INTERIOR = 2 * ROWS  # keys that all rows of a call see, from which on cutting off the edge of a band pays

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel:
    """torch's fused CPU kernel; grouped heads need no expansion."""

    name = "cpu-flash"

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Dropout is not fused on CPU."""
        return "the fused CPU kernel has no dropout" if scoring.dropout is not None else ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """See the contract."""
        value_dim = v.shape[-1]
        q, k, v = _equal_head_sizes(q, k, v)
        if scoring.is_plain:
            out, lse = _forward(q, k, v, 0.0, scoring.visible.is_causal, attn_mask=None, scale=scoring.scale)
            return _trimmed(out, value_dim), lse, None
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=statistics_dtype(q.dtype))
        for rows, calls in _calls(q, k, scoring):
            part = (slice(None), slice(None), slice(rows.start, rows.stop))
            total = Accumulator(q[part], q.shape[-1])
            for call in calls:
                total.add(*_forward_call(q[part], k[call.place], v[call.place], call, scoring.scale))
            out[part], lse[part] = total.out, total.lse
        return _trimmed(out, value_dim), lse, None

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scoring: Scoring,
        rng_state: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract; rows that saw nothing pass 0 as statistic, since -inf would give NaN."""
        key_dim, value_dim = k.shape[-1], v.shape[-1]
        lse = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
        q, k, v = _equal_head_sizes(q, k, v)
        grad_out, out = (_widened(tensor.to(q.dtype), q.shape[-1]) for tensor in (grad_out, out))
        if scoring.is_plain:
            dq, dk, dv = _backward(
                grad_out, q, k, v, out, lse, 0.0, scoring.visible.is_causal, attn_mask=None, scale=scoring.scale
            )
            return dq[..., :key_dim], dk[..., :key_dim], dv[..., :value_dim]
        dq, dk, dv = torch.zeros_like(q), GradientSum(k), GradientSum(v)
        for rows, calls in _calls(q, k, scoring):
            part = (slice(None), slice(None), slice(rows.start, rows.stop))
            total = GradientSum(q[part])
            for call in calls:
                gradients = _backward(
                    grad_out[part], q[part], k[call.place], v[call.place], out[part], lse[part], 0.0, call.causal,
                    attn_mask=call.mask, scale=scoring.scale,
                )  # fmt: skip
                for sum_, gradient, place in zip((total, dk, dv), gradients, ((), call.place, call.place), strict=True):
                    sum_.add(gradient, place)
            dq[part] = total.total
        return dq[..., :key_dim], dk.total[..., :key_dim], dv.total[..., :value_dim]


class _Call(NamedTuple):
    """Keys that one kernel call gets beside its rows, and what of them is visible."""

    keys: range
    causal: bool = False
    mask: Tensor | None = None

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """Where they are in k and v."""
        return slice(None), slice(None), slice(self.keys.start, self.keys.stop)


def _calls(q: Tensor, k: Tensor, scoring: Scoring) -> Iterator[tuple[range, list[_Call]]]:
    """Chunks of rows, and the calls that cover what each of them sees."""
    if scoring.bias is not None:
        for rows, keys, mask in masked_parts(q, k, scoring, ROWS):
            yield rows, [_Call(keys, mask=mask)]
        return
    visible = scoring.visible
    for start in range(0, q.shape[2], ROWS):
        rows = range(start, min(start + ROWS, q.shape[2]))
        if keys := visible.key_range(rows, k.shape[2]):
            yield rows, [_call(rows, part, visible, q) for part in cut_at_edges(rows, keys, visible)]


def cut_at_edges(rows: range, keys: range, visible: Visibility) -> list[range]:
    """Keys of a chunk of rows as up to three ranges: an edge in the past, what all rows see, a causal edge in the future.

    The inner range needs no mask and the edge in the future is a triangle that the kernel knows, so less is visited; but a
    narrow band stays one range, because small calls are slow.
    """
    first, last = keys.start, keys.stop
    if visible.past is not None:
        first = max(first, rows.stop - 1 - visible.past - visible.shift)
    if visible.future is not None:
        last = min(last, rows.start + visible.future - visible.shift)
    if last < first or (first > keys.start and last - first < INTERIOR):
        return [keys]
    return [part for part in (range(keys.start, first), range(first, last), range(last, keys.stop)) if part]


def _call(rows: range, keys: range, visible: Visibility, q: Tensor) -> _Call:
    hidden = visible.mask(rows, keys, q.device)
    if hidden is None:
        return _Call(keys)
    at_diagonal = visible.future is not None and keys.start + visible.shift - rows.start == visible.future
    if at_diagonal and (visible.past is None or keys.start + visible.shift - (rows.stop - 1) >= -visible.past):
        return _Call(keys, causal=True)
    return _Call(keys, mask=torch.zeros(hidden.shape, dtype=statistics_dtype(q.dtype)).masked_fill_(hidden, float("-inf")))


def _forward_call(q: Tensor, k: Tensor, v: Tensor, call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; rows that a mask hides from all keys get 0 and -inf."""
    out, lse = _forward(q, k, v, 0.0, call.causal, attn_mask=call.mask, scale=scale)
    if call.mask is None:
        return out, lse
    blind = (call.mask == float("-inf")).all(-1)
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))


def _equal_head_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widen the narrower head size; exact, because padded columns add nothing to scores or output."""
    size = max(q.shape[-1], v.shape[-1])
    return _widened(q, size), _widened(k, size), _widened(v, size)


def _widened(tensor: Tensor, size: int) -> Tensor:
    """Heads of `size`, padded with zeros, next to each other in memory: the kernel does not look at that stride."""
    if tensor.shape[-1] < size:
        return F.pad(tensor, (0, size - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _trimmed(out: Tensor, size: int) -> Tensor:
    """`out` without padded columns, which would be kept for backward with it."""
    return out if out.shape[-1] == size else out[..., :size].clone()
