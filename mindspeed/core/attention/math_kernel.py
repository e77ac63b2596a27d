"""The definition of attention in plain torch: any device, dtype, mask, bias, head size and dropout.

Works through chunks of query rows, so that at most `MAX_SCORES` scores exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.attention.contract import Bias, Scoring, Visibility, statistics_dtype

MAX_SCORES = 1 << 22  # 16 MiB of fp32 scores per chunk


class MathKernel:
    """Reference kernel; also serves what the fused ones decline."""

    name = "math"

    def __init__(self, max_scores: int = MAX_SCORES) -> None:
        self.max_scores = max_scores

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Serves everything."""
        return ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """See the contract; `rng_state` is None: seed and places determine the dropout mask."""
        dtype = statistics_dtype(q.dtype)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=dtype)
        for rows, keys in self._chunks(q, k, scoring.visible):
            scores = self._scores(q, k, rows, keys, scoring)
            top = scores.amax(-1, keepdim=True)
            top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
            weights = (scores - top).exp_()
            total = weights.sum(-1, keepdim=True)
            weights /= torch.where(total == 0, torch.ones_like(total), total)
            if scoring.dropout is not None:
                weights *= scoring.dropout.multipliers(*weights.shape[:2], rows, keys, weights)
            part = slice(rows.start, rows.stop)
            values = v[:, :, None, keys.start : keys.stop].to(dtype)
            out[:, :, part] = (_grouped(weights, k.shape[1]) @ values).flatten(1, 2)
            lse[:, :, part] = (top + total.log()).squeeze(-1)
        return out, lse, None

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
        """Recompute the probabilities from the global log-sum-exp, chunk by chunk."""
        dtype, groups = statistics_dtype(q.dtype), k.shape[1]
        dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) for tensor in (q, k, v))
        safe_lse = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
        for rows, keys in self._chunks(q, k, scoring.visible):
            part, span = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            weights = (self._scores(q, k, rows, keys, scoring) - safe_lse[:, :, part, None]).exp_()
            grad = grad_out[:, :, part].to(dtype)
            delta = (grad * out[:, :, part].to(dtype)).sum(-1, keepdim=True)
            grad_weights = (_grouped(grad, groups) @ v[:, :, None, span].to(dtype).transpose(-1, -2)).flatten(1, 2)
            kept = weights
            if scoring.dropout is not None:
                keep = scoring.dropout.multipliers(*weights.shape[:2], rows, keys, weights)
                kept, grad_weights = weights * keep, grad_weights * keep
            grad_scores = weights * (grad_weights - delta) * scoring.scale
            dv[:, :, span] += (_grouped(kept, groups).transpose(-1, -2) @ _grouped(grad, groups)).sum(2)
            dq[:, :, part] = (_grouped(grad_scores, groups) @ k[:, :, None, span].to(dtype)).flatten(1, 2)
            queries = _grouped(q[:, :, part].to(dtype), groups)
            dk[:, :, span] += (_grouped(grad_scores, groups).transpose(-1, -2) @ queries).sum(2)
        return dq, dk, dv

    def _chunks(self, q: Tensor, k: Tensor, visible: Visibility) -> Iterator[tuple[range, range]]:
        """Query rows and the keys they may see; chunks that see nothing are left out."""
        batch, heads, num_queries, _ = q.shape
        num_keys = k.shape[2]
        step = max(1, self.max_scores // max(1, batch * heads * num_keys))
        for start in range(0, num_queries, step):
            rows = range(start, min(start + step, num_queries))
            keys = visible.key_range(rows, num_keys)
            if keys:
                yield rows, keys

    @staticmethod
    def _scores(q: Tensor, k: Tensor, rows: range, keys: range, scoring: Scoring) -> Tensor:
        """Scaled, biased scores [B, N, rows, keys] with -inf where hidden."""
        dtype = statistics_dtype(q.dtype)
        queries = _grouped(q[:, :, rows.start : rows.stop].to(dtype), k.shape[1])
        scores = (queries @ k[:, :, None, keys.start : keys.stop].to(dtype).transpose(-1, -2)).flatten(1, 2).mul_(scoring.scale)
        if scoring.bias is not None:
            scores += part_of_bias(scoring.bias, rows, keys).to(q.device, dtype)
        hidden = scoring.visible.mask(rows, keys, q.device)
        return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))


def part_of_bias(bias: Bias, rows: range, keys: range) -> Tensor:
    """The part of a bias for these rows and keys; a tensor's last two dims may be 1 (broadcast)."""
    if not isinstance(bias, Tensor):
        return bias(rows, keys)
    row_part = slice(rows.start, rows.stop) if bias.shape[-2] != 1 else slice(None)
    key_part = slice(keys.start, keys.stop) if bias.shape[-1] != 1 else slice(None)
    return bias[..., row_part, key_part]


def masked_parts(q: Tensor, k: Tensor, scoring: Scoring, step: int) -> Iterator[tuple[range, range, Tensor | None]]:
    """Chunks of `step` rows, the keys they may see and their additive mask, for kernels that take one.

    The mask is fp32 (fp64 for fp64), [rows, keys] or [1 or B, 1 or N, rows, keys]; None where nothing is hidden or added.
    Chunks that see nothing are left out.
    """
    dtype = statistics_dtype(q.dtype)
    for start in range(0, q.shape[2], step):
        rows = range(start, min(start + step, q.shape[2]))
        keys = scoring.visible.key_range(rows, k.shape[2])
        if not keys:
            continue
        mask = None if scoring.bias is None else part_of_bias(scoring.bias, rows, keys).to(q.device, dtype)
        hidden = scoring.visible.mask(rows, keys, q.device)
        if hidden is not None:
            base = torch.zeros((), dtype=dtype, device=q.device) if mask is None else mask
            mask = torch.where(hidden, float("-inf"), base)
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], len(rows), len(keys))
            mask = mask if mask.dim() in (2, 4) else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        yield rows, keys, mask


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """[B, N, ...] -> [B, G, N / G, ...]: query heads beside the key head that they share."""
    return heads.unflatten(1, (groups, -1))
