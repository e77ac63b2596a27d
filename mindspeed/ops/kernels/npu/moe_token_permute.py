"""Token permutation through torch_npu's kernels where every copy of a token exists, else by one scatter, without asking the
device how many there are."""

# T tokens, K copies per token, R permuted rows, H hidden

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take, lacks

MOST_ENTRIES = 16777215  # the kernels count in float32
MOST_COPIES = 512


def _declines(name: str, rows: Tensor, entries: int) -> str | None:
    if entries >= MOST_ENTRIES:
        return f"{name} takes fewer than {MOST_ENTRIES} entries, not {entries}"
    return cannot_take(name, rows) or lacks(name)


def _map_declines(name: str, like: Tensor, rows: int, row_map: Tensor) -> str | None:
    """The kernels want each of 0..R-1 once; a map of as many entries as rows has no gaps."""
    if rows != row_map.numel():
        return "some copies of tokens do not exist"
    if row_map.shape[1] > MOST_COPIES:
        return f"{name} takes at most {MOST_COPIES} copies of a token, not {row_map.shape[1]}"
    return _declines(name, like, row_map.numel())


@register_kernel(
    "moe_token_permute",
    "npu",
    devices=("npu",),
    declines=lambda tokens, indices, *_: _declines("npu_moe_token_permute", tokens, indices.numel()),
)
def moe_token_permute(tokens: Tensor, indices: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Forward; `num_out` 0 would mean all rows to the kernel."""
    if num_out == 0:
        return tokens.new_empty(0, tokens.shape[1]), torch_npu.npu_moe_token_permute(tokens, indices)[1]
    permuted, sorted_indices = torch_npu.npu_moe_token_permute(tokens, indices, num_out_tokens=num_out)
    return permuted, sorted_indices.to(torch.int32)


@register_kernel(
    "moe_token_permute_backward",
    "npu",
    devices=("npu",),
    declines=lambda dpermuted, row_map: _map_declines("npu_moe_token_permute_grad_v2", dpermuted, dpermuted.shape[0], row_map),
)
def moe_token_permute_backward(dpermuted: Tensor, row_map: Tensor) -> Tensor:
    """Gradient of the tokens."""
    count, copies = row_map.shape
    return torch_npu.npu_moe_token_permute_grad_v2(dpermuted, row_map.flatten(), count, dpermuted.dtype, copies)


@register_kernel(
    "moe_token_unpermute",
    "npu",
    devices=("npu",),
    declines=lambda permuted, row_map, probs: (
        _map_declines("npu_moe_token_unpermute", permuted, permuted.shape[0], row_map)
        or (None if probs is not None or row_map.shape[1] == 1 else "there are no probabilities")
    ),
)
def moe_token_unpermute(permuted: Tensor, row_map: Tensor, probs: Tensor | None) -> Tensor:
    """Forward; the kernel takes its number of copies from the probabilities."""
    return torch_npu.npu_moe_token_unpermute(permuted, row_map.flatten(), probs=probs)


@register_kernel(
    "moe_token_unpermute_backward",
    "npu",
    devices=("npu",),
    declines=lambda dout, permuted, row_map, probs, rows: (
        _map_declines("npu_moe_token_unpermute_grad", dout, rows, row_map)
        or (None if permuted is not None or (probs is None and row_map.shape[1] == 1) else "the permuted tokens were not kept")
    ),
)
def moe_token_unpermute_backward(
    dout: Tensor, permuted: Tensor | None, row_map: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the permuted tokens and of the probabilities."""
    kept = dout if permuted is None else permuted  # without probabilities only its size is read
    dpermuted, dprobs = torch_npu.npu_moe_token_unpermute_grad(kept, dout, row_map.flatten(), probs=probs)
    return dpermuted, dout.new_empty(0) if permuted is None else dprobs


# ---- maps with gaps --------------------------------------------------------------------------------------------------------


def _slots(row_map: Tensor, rows: int) -> Tensor:
    """The row of each copy; row `rows`, one too many, for copies that do not exist."""
    flat = row_map.flatten().to(torch.int64)
    return torch.where((flat >= 0) & (flat < rows), flat, rows)


def _by_row(values: Tensor, slots: Tensor, rows: int) -> Tensor:
    """`values` of each copy at the row where it went: [R]."""
    return torch.zeros(rows + 1, dtype=values.dtype, device=values.device).scatter_(0, slots, values)[:rows]


@register_kernel(
    "moe_token_unpermute", "npu", devices=("npu",), declines=lambda rows, *_: cannot_take("the sum in float32", rows)
)
def unpermute_with_gaps(permuted: Tensor, row_map: Tensor, probs: Tensor | None) -> Tensor:
    """Sum of the existing rows of each token, in float32."""
    (count, copies), rows = row_map.shape, permuted.shape[0]
    slots = _slots(row_map, rows)
    token = _by_row(torch.arange(count, device=slots.device).repeat_interleave(copies), slots, rows)
    wide = permuted.to(torch.float32)
    if probs is not None:
        wide = wide * _by_row(probs.flatten().to(torch.float32), slots, rows).unsqueeze(1)
    out = torch.zeros(count, permuted.shape[1], dtype=torch.float32, device=permuted.device)
    return out.index_add_(0, token, wide).to(permuted.dtype)


@register_kernel(
    "moe_token_permute_backward", "npu", devices=("npu",), declines=lambda rows, *_: cannot_take("the sum in float32", rows)
)
def permute_backward_with_gaps(dpermuted: Tensor, row_map: Tensor) -> Tensor:
    """Gradient of the tokens."""
    return unpermute_with_gaps(dpermuted, row_map, None)


@register_kernel(
    "moe_permute_map_backward", "npu", devices=("npu",), declines=lambda rows, *_: cannot_take("the sum in float32", rows)
)
def permute_map_backward(dpermuted: Tensor, dprobs: Tensor | None, row_map: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and probabilities [T, E]."""
    dtokens = unpermute_with_gaps(dpermuted, row_map, None)
    if dprobs is None:
        return dtokens, dpermuted.new_empty(0)
    padded = torch.cat([dprobs, dprobs.new_zeros(1)])
    return dtokens, padded[_slots(row_map, dprobs.shape[0])].view(row_map.shape)


@register_kernel(
    "moe_token_unpermute_backward", "npu", devices=("npu",), declines=lambda rows, *_: cannot_take("the sum in float32", rows)
)
def unpermute_backward_with_gaps(
    dout: Tensor, permuted: Tensor | None, row_map: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the permuted tokens and of the probabilities."""
    count, copies = row_map.shape
    slots = _slots(row_map, rows)
    token = _by_row(torch.arange(count, device=slots.device).repeat_interleave(copies), slots, rows)
    exists = _by_row(torch.ones_like(slots, dtype=torch.float32), slots, rows).unsqueeze(1)
    grads = dout.index_select(0, token).to(torch.float32) * exists
    weighted = grads if probs is None else grads * _by_row(probs.flatten().to(torch.float32), slots, rows).unsqueeze(1)
    if permuted is None:
        return weighted.to(dout.dtype), dout.new_empty(0)
    products = (permuted.to(torch.float32) * grads).sum(1)
    dprobs = torch.cat([products, products.new_zeros(1)])[slots].view(probs.shape)
    return weighted.to(dout.dtype), dprobs.to(probs.dtype)
