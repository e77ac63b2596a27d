"""Scaled masked softmax through `npu_scaled_masked_softmax`.

The kernel wants a mask in any case and gives a row without any entry left equal weights; ours gives zeros, so such rows are
cleared afterwards. They cannot occur without a mask of the caller.
"""

# Q query positions, K key positions

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel


def _declines(x: Tensor) -> str | None:
    queries, keys = x.shape[-2:]
    if x.dtype == torch.float64 or x.dim() > 4:
        return f"npu_scaled_masked_softmax takes up to 4 dimensions of at most 32 bit, not {x.dim()} of {x.dtype}"
    if not all(32 <= size <= 4096 and size % 32 == 0 for size in (queries, keys)):
        return f"npu_scaled_masked_softmax wants multiples of 32 up to 4096, not {queries} x {keys}"
    return None


def _four(value: Tensor) -> Tensor:
    return value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))


@register_kernel(
    "scaled_masked_softmax",
    "npu",
    devices=("npu",),
    declines=lambda x, mask, scale, causal: _declines(x) or (None if causal or mask is not None else "nothing is masked"),
)
def scaled_masked_softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Forward."""
    queries, keys = x.shape[-2:]
    excluded = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu_(1) if causal else None
    if mask is not None:
        excluded = mask if excluded is None else mask | excluded
    excluded = _four(excluded.expand(*excluded.shape[:-2], queries, keys)).contiguous()
    y = torch_npu.npu_scaled_masked_softmax(_four(x).contiguous(), excluded, scale, False).view(x.shape)
    if mask is None:
        return y
    return y.masked_fill_(excluded.all(-1, keepdim=True).view((*excluded.shape[4 - x.dim() : 3], 1)), 0.0)


@register_kernel("scaled_masked_softmax_backward", "npu", devices=("npu",), declines=lambda dy, y, scale: _declines(y))
def scaled_masked_softmax_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    """Gradient of x; y is zero where entries were excluded, so the kernel's mask may be empty."""
    nothing = torch.zeros(1, 1, *y.shape[-2:], dtype=torch.bool, device=y.device)
    dx = torch_npu.npu_scaled_masked_softmax_backward(_four(dy).contiguous(), _four(y), nothing, scale, False)
    return dx.view(y.shape)
