"""Fused attention on CPU: `aten::_scaled_dot_product_flash_attention_for_cpu` and its backward.

Facts that this file guards against (torch 2.7 to 2.13): an empty query or key range kills the process
(the dispatcher never passes one); a fully masked row gets a log-sum-exp of 0 instead of -inf; boolean masks are
refused; dropout and a value head size other than the query's are refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed.core.attention.contract import Scoring
from mindspeed.core.attention.math_kernel import masked_parts

ROWS = 256  # rows per call where a mask tensor has to be built: bounds it to 256 x keys

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
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for rows, keys, mask in masked_parts(q, k, scoring, ROWS):
            part, span = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            out_part, lse_part = _forward(
                q[:, :, part], k[:, :, span], v[:, :, span], 0.0, False, attn_mask=mask, scale=scoring.scale
            )
            if mask is not None:
                blind = (mask == float("-inf")).all(-1)
                lse_part = lse_part.masked_fill(blind, float("-inf"))
                out_part = out_part.masked_fill(blind[..., None], 0.0)
            out[:, :, part], lse[:, :, part] = out_part, lse_part
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
        missing = q.shape[-1] - value_dim
        grad_out, out = (F.pad(tensor.to(q.dtype), (0, missing)) for tensor in (grad_out, out))
        if scoring.is_plain:
            dq, dk, dv = _backward(
                grad_out, q, k, v, out, lse, 0.0, scoring.visible.is_causal, attn_mask=None, scale=scoring.scale
            )
            return dq[..., :key_dim], dk[..., :key_dim], dv[..., :value_dim]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows, keys, mask in masked_parts(q, k, scoring, ROWS):
            part, span = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            dq_part, dk_part, dv_part = _backward(
                grad_out[:, :, part],
                q[:, :, part],
                k[:, :, span],
                v[:, :, span],
                out[:, :, part],
                lse[:, :, part],
                0.0,
                False,
                attn_mask=mask,
                scale=scoring.scale,
            )
            dq[:, :, part] = dq_part
            dk[:, :, span] += dk_part
            dv[:, :, span] += dv_part
        return dq[..., :key_dim], dk[..., :key_dim], dv[..., :value_dim]


def _equal_head_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-pad the narrower head size; exact, because padded columns add nothing to scores or output."""
    size = max(q.shape[-1], v.shape[-1])
    return tuple(F.pad(tensor, (0, size - tensor.shape[-1])) if tensor.shape[-1] < size else tensor for tensor in (q, k, v))  # type: ignore[return-value]


def _trimmed(out: Tensor, size: int) -> Tensor:
    """`out` without padded columns, which would be kept for backward with it."""
    return out if out.shape[-1] == size else out[..., :size].clone()
