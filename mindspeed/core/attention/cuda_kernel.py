"""Attention on CUDA through aten's two fused families, without any other library.

`aten::_flash_attention_*` (fp16, bf16): layout [B, S, heads, D], grouped heads, bands as windows. Facts that this file
guards against: windows and the causal triangle are aligned at the lower right corner; a negative window means no
limit; a row that sees nothing has log-sum-exp +inf; head sizes are multiples of 8, equal for keys and values.

`aten::_scaled_dot_product_efficient_attention*` (also fp32, additive bias): statistics are padded to a multiple of 32
rows; heads are not shared; rows of the bias are aligned; what it reports for rows that see nothing is not relied on.

Dropout masks come from the device's generator, set to the seed of the tile for the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed.core.attention.contract import Scoring, Visibility
from mindspeed.core.attention.math_kernel import masked_parts

HALF = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)
FLASH_HEAD_SIZE = 256
HEAD_UNIT = 8  # head sizes are padded with zeros to a multiple of it, which changes no score
LSE_UNIT = 32
BIAS_UNIT = 16  # elements; rows of a bias start at multiples of it
ROWS = 2048  # rows per call where a bias has to be built: bounds it to 2048 x keys

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward


class FlashKernel:
    """Full, causal and band tiles in 16 bits. `rng_state` holds the two tensors that aten's backward wants."""

    name = "cuda-flash"

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Dtype, device, head size, bias, or a band that no window expresses."""
        if q.dtype not in HALF:
            return f"flash attention has no {q.dtype}"
        if scoring.bias is not None:
            return "flash attention takes no bias"
        if max(q.shape[-1], v.shape[-1]) > FLASH_HEAD_SIZE:
            return f"flash attention takes head sizes up to {FLASH_HEAD_SIZE}, not {max(q.shape[-1], v.shape[-1])}"
        if any(limit is not None and limit < 0 for limit in window(scoring.visible, q.shape[2], k.shape[2])):
            return "a band beside the tile's diagonal is no window of flash attention"
        if torch.cuda.get_device_capability(q.device) < FLASH_CAPABILITY:
            return f"flash attention needs compute capability {'.'.join(map(str, FLASH_CAPABILITY))}"
        return ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """See the contract."""
        query, key, value = _equal_head_sizes(q, k, v)
        dropout = scoring.dropout
        with _drawing_from(q.device, None if dropout is None else dropout.seed):
            out, lse, rng, unused, _ = _flash(
                *(tensor.transpose(1, 2) for tensor in (query, key, value)),
                None, None, q.shape[2], k.shape[2], 0.0 if dropout is None else dropout.probability,
                scoring.visible.is_causal and q.shape[2] == k.shape[2], False, scale=scoring.scale, **_window_arguments(q, k, scoring),
            )  # fmt: skip
        out = out.transpose(1, 2)[..., : v.shape[-1]]
        blind = torch.isinf(lse)
        return out, lse.masked_fill(blind, float("-inf")), (rng, unused)

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
        """See the contract; rows that saw nothing pass 0 as statistic."""
        query, key, value = _equal_head_sizes(q, k, v)
        missing = query.shape[-1] - v.shape[-1]
        grad_out, out = (F.pad(tensor.to(q.dtype), (0, missing)) for tensor in (grad_out, out))
        lse = torch.where(torch.isinf(lse), 0.0, lse.float()).contiguous()
        dropout = scoring.dropout
        gradients = _flash_backward(
            *(tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out)),
            lse, None, None, q.shape[2], k.shape[2], 0.0 if dropout is None else dropout.probability,
            scoring.visible.is_causal and q.shape[2] == k.shape[2], *rng_state, scale=scoring.scale, **_window_arguments(q, k, scoring),
        )  # fmt: skip
        return tuple(  # type: ignore[return-value]
            gradient.transpose(1, 2)[..., : like.shape[-1]] for gradient, like in zip(gradients, (q, k, v), strict=True)
        )


def window(visible: Visibility, queries: int, keys: int) -> tuple[int | None, int | None]:
    """(left, right) of a window aligned at the lower right corner that shows what `visible` shows; None is no limit."""
    shift = visible.shift + keys - queries
    left = None if visible.past is None else visible.past + shift
    right = None if visible.future is None else visible.future - shift
    return left, right


def _window_arguments(q: Tensor, k: Tensor, scoring: Scoring) -> dict[str, int]:
    """Window arguments of flash attention; none for full and square causal tiles, which have faster kernels."""
    visible, queries, keys = scoring.visible, q.shape[2], k.shape[2]
    if visible.is_full or (visible.is_causal and queries == keys):
        return {}
    left, right = window(visible, queries, keys)
    return {"window_size_left": -1 if left is None else left, "window_size_right": -1 if right is None else right}


class EfficientKernel:
    """fp32, and tiles with a bias. `rng_state` holds seed and offset of each chunk of rows."""

    name = "cuda-efficient"

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Dtype alone."""
        return "" if q.dtype in (*HALF, torch.float32) else f"memory-efficient attention has no {q.dtype}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """See the contract."""
        query, key, value = _expanded(q, k, v)
        out = q.new_zeros((*q.shape[:-1], value.shape[-1]))
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
        states = []
        for rows, keys, bias in _parts(q, k, scoring):
            part, span = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            probability, seed = _dropout_of(scoring, rows)
            with _drawing_from(q.device, seed):
                out_part, lse_part, *state = _efficient(
                    query[:, :, part], key[:, :, span], value[:, :, span], _aligned(bias, query, rows, keys), True, probability,
                    _is_triangle(scoring), scale=scoring.scale,
                )  # fmt: skip
            lse_part = lse_part[..., : len(rows)]
            if bias is not None:
                blind = (bias == float("-inf")).all(-1)
                lse_part, out_part = lse_part.masked_fill(blind, float("-inf")), out_part.masked_fill(blind[..., None], 0.0)
            out[:, :, part], lse[:, :, part] = out_part, lse_part
            states.append(tuple(state))
        return out[..., : v.shape[-1]], lse, states

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
        """See the contract; gradients of repeated heads are summed in fp32."""
        query, key, value = _expanded(q, k, v)
        missing = value.shape[-1] - v.shape[-1]
        grad_out, out = (F.pad(tensor.to(q.dtype), (0, missing)) for tensor in (grad_out, out))
        lse = torch.where(torch.isinf(lse), 0.0, lse.float())
        dq = torch.zeros_like(query)
        dk, dv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        for (rows, keys, bias), (seed, offset) in zip(_parts(q, k, scoring), rng_state, strict=True):
            part, span = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            statistics = F.pad(lse[:, :, part], (0, -len(rows) % LSE_UNIT))
            dq_part, dk_part, dv_part, _ = _efficient_backward(
                grad_out[:, :, part], query[:, :, part], key[:, :, span], value[:, :, span],
                _aligned(bias, query, rows, keys), out[:, :, part], statistics, seed, offset, _dropout_of(scoring, rows)[0],
                [True, True, True, False], _is_triangle(scoring), scale=scoring.scale,
            )  # fmt: skip
            dq[:, :, part] = dq_part
            dk[:, :, span] += dk_part
            dv[:, :, span] += dv_part
        dk, dv = (gradient.unflatten(1, (k.shape[1], -1)).sum(2) for gradient in (dk, dv))
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _parts(q: Tensor, k: Tensor, scoring: Scoring) -> Iterator[tuple[range, range, Tensor | None]]:
    """One call without a bias for full and causal tiles, else chunks of rows."""
    if scoring.is_plain:
        return iter([(range(q.shape[2]), range(k.shape[2]), None)])
    return masked_parts(q, k, scoring, ROWS)


def _is_triangle(scoring: Scoring) -> bool:
    return scoring.is_plain and scoring.visible.is_causal


def _dropout_of(scoring: Scoring, rows: range) -> tuple[float, int | None]:
    """Probability and seed of a chunk of rows."""
    if scoring.dropout is None:
        return 0.0, None
    return scoring.dropout.probability, (scoring.dropout.seed + 0x9E3779B97F4A7C15 * rows.start) & (2**63 - 1)


def _aligned(bias: Tensor | None, q: Tensor, rows: range, keys: range) -> Tensor | None:
    """A bias [B, N, rows, keys] in the dtype of q whose rows start at aligned places; samples and heads stay shared."""
    if bias is None:
        return None
    bias = bias if bias.dim() == 4 else bias[None, None]
    room = q.new_empty((*bias.shape[:2], len(rows), len(keys) + -len(keys) % BIAS_UNIT))
    return room[..., : len(keys)].copy_(bias).expand(q.shape[0], q.shape[1], -1, -1)


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes padded to the unit, key heads repeated to the number of query heads."""
    repeats = q.shape[1] // k.shape[1]
    padded = [F.pad(t, (0, -t.shape[-1] % HEAD_UNIT)) if t.shape[-1] % HEAD_UNIT else t for t in (q, k, v)]
    if repeats > 1:
        padded[1:] = [tensor.repeat_interleave(repeats, 1) for tensor in padded[1:]]
    return tuple(padded)  # type: ignore[return-value]


def _equal_head_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-pad to one head size that is a multiple of the unit; exact, padded columns add nothing."""
    size = max(q.shape[-1], v.shape[-1])
    size += -size % HEAD_UNIT
    return tuple(F.pad(tensor, (0, size - tensor.shape[-1])) if tensor.shape[-1] < size else tensor for tensor in (q, k, v))  # type: ignore[return-value]


@contextlib.contextmanager
def _drawing_from(device: torch.device, seed: int | None) -> Iterator[None]:
    """Draw with this seed inside the block; the device's generator goes on afterwards as if nothing had been drawn."""
    if seed is None:
        yield
        return
    generator = torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
