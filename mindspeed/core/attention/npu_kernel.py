"""Attention on NPU through the operator `fusion_attention`, whose NPU body calls `npu_fusion_attention_v2`.

    tile                      atten_mask                     sparse_mode
    causal                    triangle of 2048 x 2048        2 (aligned at the upper left corner)
    full                      none                           0
    band                      triangle of 2048 x 2048        4 with pre_tokens and next_tokens
    mask, bias with -inf      [Sq, Sk] or [B, N, Sq, Sk]     1

The kernel looks at the triangle only to learn that there is one, so a tile of any size shares it. Rows that a mask
may hide from all keys are announced by the operator's body. ALiBi of a square tile over contiguous positions is made inside
the kernel from slopes; any other bias is a tensor in the dtype of q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.attention.bias import AlibiBias, MaskBias, SumOfBiases
from mindspeed.core.attention.contract import Scoring, Visibility
from mindspeed.core.attention.math_kernel import part_of_bias
from mindspeed.ops import fusion_attention_v2  # noqa: F401 - defines the operator

TRIANGLE = 2048
NO_LIMIT = 2147483647
STATISTICS = 8  # equal copies of each softmax statistic
NEVER = -1e37  # what the kernel reports for a row without keys lies below, whether it writes -inf or the lowest float
FUSED_DISTANCES = {"absolute": 2, "root": 3}  # values of pse_type
MAX_HEADS, MAX_HEAD_SIZE = 256, 512


@dataclass(frozen=True)
class Mask:
    """How the kernel is told what is hidden."""

    tensor: Tensor | None = None
    mode: int = 0
    pre: int = NO_LIMIT
    next: int = NO_LIMIT


@dataclass(frozen=True)
class PositionBias:
    """How the kernel is told what to add to the scores: a tensor (kind 0), or slopes (2, 3) and first positions."""

    tensor: Tensor | None = None
    kind: int = 1
    query_start: int = 0
    key_start: int = 0


class NpuKernel:
    """The NPU's fused attention; grouped heads need no expansion. `rng_state` is (seed, offset, numels) of the tile."""

    name = "npu-fusion"

    def __init__(self) -> None:
        self._triangles: dict[torch.device, Tensor] = {}

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Limits of the kernel's documentation."""
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"npu_fusion_attention has no {q.dtype}"
        if q.shape[1] > MAX_HEADS:
            return f"npu_fusion_attention takes at most {MAX_HEADS} heads, not {q.shape[1]}"
        if not v.shape[-1] <= q.shape[-1] <= MAX_HEAD_SIZE:
            sizes = f"{q.shape[-1]} of keys and {v.shape[-1]} of values"
            return f"npu_fusion_attention takes head sizes up to {MAX_HEAD_SIZE}, of values at most that of keys, not {sizes}"
        return ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """See the contract."""
        state = _random_state(q, k, scoring)
        order = scoring.memory_order
        tensors = (_arranged(tensor, order) for tensor in (q, k, v))
        out, top, total = torch.ops.mindspeed.fusion_attention(*tensors, *self._arguments(q, k, scoring, state))
        lse = top[..., 0] + total[..., 0].log()
        return _heads_first(out, q.shape[1], order), lse.masked_fill(lse < NEVER, float("-inf")), state

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
        """See the contract; the log-sum-exp stands for the maximum, with a sum of one."""
        order = scoring.memory_order
        top = torch.where(torch.isinf(lse), 0.0, lse.float()).unsqueeze(-1).expand(*lse.shape, STATISTICS).contiguous()
        grad_out, query, key, value, out = (_arranged(tensor.to(q.dtype), order) for tensor in (grad_out, q, k, v, out))
        dq, dk, dv, _ = torch.ops.mindspeed.fusion_attention_backward(
            grad_out, query, key, value, out, top, torch.ones_like(top), False, *self._arguments(q, k, scoring, rng_state)
        )
        return _heads_first(dq, q.shape[1], order), _heads_first(dk, k.shape[1], order), _heads_first(dv, k.shape[1], order)

    def _arguments(self, q: Tensor, k: Tensor, scoring: Scoring, state: tuple[int, int, int] | None) -> tuple[Any, ...]:
        """Arguments of the operator after query, key and value, in the order of its schema."""
        hidden, bias = self._bias(q, k, scoring)
        mask = self._mask(q, k, scoring.visible, hidden)
        keep = 1.0 if scoring.dropout is None else 1.0 - scoring.dropout.probability
        numbers = (scoring.scale, keep, mask.pre, mask.next, 0)
        packed = (None, None, None)  # prefix, ends of packed queries and keys
        starts = ([bias.query_start], [bias.key_start]) if bias.kind in (2, 3) else (None, None)
        rng = None if state is None else torch.tensor(state[:2], dtype=torch.int64)
        return (
            q.shape[1], scoring.memory_order, bias.tensor, mask.tensor, *numbers, *packed, mask.mode, bias.kind, *starts, rng
        )  # fmt: skip

    def _mask(self, q: Tensor, k: Tensor, visible: Visibility, hidden: Tensor | None) -> Mask:
        """The cheapest form in which the kernel understands what is visible."""
        queries, keys = q.shape[2], k.shape[2]
        if hidden is not None:
            limits = visible.mask(range(queries), range(keys), q.device)
            return Mask(hidden if limits is None else hidden | limits, 1)
        if visible.is_full:
            return Mask()
        if visible.is_causal:
            return Mask(self._triangle(q.device), 2)
        shift = visible.shift + keys - queries  # the kernel aligns a band at the lower right corner
        pre = NO_LIMIT if visible.past is None else visible.past + shift
        after = NO_LIMIT if visible.future is None else visible.future - shift
        if pre < 0 or after < 0:  # beside the diagonal; planned tiles never are
            return Mask(visible.mask(range(queries), range(keys), q.device), 1)
        return Mask(self._triangle(q.device), 4, pre, after)

    def _triangle(self, device: torch.device) -> Tensor:
        """True above the diagonal; one for all tiles of a device."""
        if device not in self._triangles:
            self._triangles[device] = torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)
        return self._triangles[device]

    @staticmethod
    def _bias(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[Tensor | None, PositionBias]:
        """What a bias hides ([Sq, Sk] or [B or 1, N or 1, Sq, Sk], True where hidden), and what it adds."""
        parts = scoring.bias.parts if isinstance(scoring.bias, SumOfBiases) else (scoring.bias,)
        masks = [part.hidden.to(q.device) for part in parts if isinstance(part, MaskBias)]
        others = [part for part in parts if part is not None and not isinstance(part, MaskBias)]
        hidden = masks[0] if masks else None
        for mask in masks[1:]:
            hidden = hidden | mask
        if not others:
            return hidden, PositionBias()
        square = q.shape[2] == k.shape[2]  # the kernel counts positions of as many queries as keys only
        if len(others) == 1 and square and (fused := _fused_alibi(others[0], q.device)) is not None:
            return hidden, fused
        rows, keys = range(q.shape[2]), range(k.shape[2])
        total = sum(part_of_bias(part, rows, keys).to(q.device, torch.float32) for part in others)
        if not all(isinstance(part, AlibiBias) for part in others):
            # In the bias itself -inf would turn rows without keys into NaN; in the mask it does not.
            never = total == float("-inf")
            total = total.masked_fill(never, 0.0)
            never = never.expand(*never.shape[:-2], len(rows), len(keys))
            hidden = never if hidden is None else never | hidden
            hidden = hidden if hidden.dim() in (2, 4) else hidden.unsqueeze(0)
        samples = total.shape[0] if total.dim() == 4 else 1
        return hidden, PositionBias(total.expand(samples, q.shape[1], len(rows), len(keys)).to(q.dtype).contiguous(), kind=0)


def _fused_alibi(bias: object, device: torch.device) -> PositionBias | None:
    """Slopes for the kernel, where it knows the distance and can count positions by itself."""
    if not isinstance(bias, AlibiBias) or bias.distance not in FUSED_DISTANCES:
        return None
    starts = bias.starts()
    return None if starts is None else PositionBias(bias.slopes.to(device), FUSED_DISTANCES[bias.distance], *starts)


def _random_state(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[int, int, int] | None:
    """(seed, offset, numels) of the tile's dropout mask, which forward and backward draw from the same state."""
    if scoring.dropout is None:
        return None
    return scoring.dropout.seed, 0, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def _arranged(tensor: Tensor, order: str) -> Tensor:
    """[B, heads, S, D] as the kernel reads it; a view wherever memory lies so already."""
    return tensor.contiguous() if order == "BNSD" else tensor.permute(2, 0, 1, 3).flatten(2)


def _heads_first(tensor: Tensor, heads: int, order: str) -> Tensor:
    """[B, heads, S, D] view of a result."""
    return tensor if order == "BNSD" else tensor.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
