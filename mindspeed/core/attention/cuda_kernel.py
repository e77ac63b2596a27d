"""Attention on CUDA through aten's two fused families; `mindspeed.ops._aten_attention` knows their rules.

Flash attention serves full, causal and band tiles in 16 bits; memory-efficient attention serves fp32 and tiles with a bias,
which is built for a limited number of rows at a time. Dropout masks follow from the seed of the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.attention.contract import Scoring, Visibility
from mindspeed.core.attention.math_kernel import masked_parts
from mindspeed.ops import _aten_attention as aten
from mindspeed.ops._attention_choice import EFFICIENT_CAPABILITY


class FlashKernel:
    """Full, causal and band tiles in 16 bits. `rng_state` holds the two tensors that aten's backward wants."""

    name = "cuda-flash"

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Dtype, device, head size, bias, or a band that no window expresses."""
        if scoring.bias is not None:
            return "flash attention takes no bias"
        capability = torch.cuda.get_device_capability(q.device)
        refusal = aten.flash_refuses(q.dtype, capability, max(q.shape[-1], v.shape[-1]), scoring.dropout is not None)
        return refusal or _window(q, k, scoring)[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """See the contract."""
        return aten.flash(q, k, v, scale=scoring.scale, window=_window(q, k, scoring)[0], **_dropout(scoring))

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
        """See the contract."""
        options = {"scale": scoring.scale, "window": _window(q, k, scoring)[0], "probability": _probability(scoring)}
        return aten.flash_backward(grad_out, q, k, v, out, lse, rng_state, **options)


class EfficientKernel:
    """fp32, and tiles with a bias. `rng_state` holds seed and offset of each chunk of rows."""

    name = "cuda-efficient"

    def declines(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> str:
        """Dtype, and what the device must have for it."""
        if q.dtype not in EFFICIENT_CAPABILITY:
            return f"memory-efficient attention has no {q.dtype}"
        needed = EFFICIENT_CAPABILITY[q.dtype]
        if torch.cuda.get_device_capability(q.device) < needed:
            return f"memory-efficient attention in {q.dtype} needs compute capability {needed[0]}.{needed[1]}"
        return ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor, Any]:
        """See the contract."""
        options = {"scale": scoring.scale, "causal": _is_triangle(scoring), **_dropout(scoring)}
        return aten.efficient(q, k, v, _parts(q, k, scoring), **options)

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
        """See the contract."""
        options = {"scale": scoring.scale, "causal": _is_triangle(scoring), **_dropout(scoring)}
        return aten.efficient_backward(grad_out, q, k, v, out, lse, _parts(q, k, scoring), rng_state, **options)


def window(visible: Visibility, queries: int, keys: int) -> aten.Window:
    """(left, right) of a window aligned at the lower right corner that shows what `visible` shows; None is no limit."""
    shift = visible.shift + keys - queries
    left = None if visible.past is None else visible.past + shift
    right = None if visible.future is None else visible.future - shift
    return left, right


def _window(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[aten.Window, str]:
    queries, keys = q.shape[2], k.shape[2]
    return aten.fitting_window(window(scoring.visible, queries, keys), [(queries, keys)])


def _parts(q: Tensor, k: Tensor, scoring: Scoring) -> Iterator[aten.Part]:
    """One call without a bias for full and causal tiles, else chunks of rows."""
    if scoring.is_plain:
        return iter([(range(q.shape[2]), range(k.shape[2]), None)])
    bias = scoring.bias
    if isinstance(bias, Tensor):
        planes = bias.shape[:-2].numel()
    else:
        planes = 1 if bias is None else q.shape[1]  # a function may make one for every head
    return masked_parts(q, k, scoring, aten.rows_per_part(planes, k.shape[2]))


def _is_triangle(scoring: Scoring) -> bool:
    return scoring.is_plain and scoring.visible.is_causal


def _probability(scoring: Scoring) -> float:
    return 0.0 if scoring.dropout is None else scoring.dropout.probability


def _dropout(scoring: Scoring) -> dict[str, Any]:
    return {"probability": _probability(scoring), "seed": 0 if scoring.dropout is None else scoring.dropout.seed}
