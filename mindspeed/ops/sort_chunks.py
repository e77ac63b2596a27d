"""Chunks of rows in another order, from sizes and order that may live on the device."""

# R rows, C chunks

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._registry import below_autograd, define, on_host, register_kernel, strict
from mindspeed.ops._transfer import to_device

OP = "sort_chunks"


def sort_chunks(x: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    """Cut the rows of `x` into chunks of `split_sizes` and join them in `order`: chunk `order[i]` comes i-th.

    x: [R, ...], any dtype; split_sizes: [C], sums to R; order: [C], a permutation; int32 or int64, on the CPU or on the device
    of x. No synchronisation. Keeps sizes and order.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: x must be a tensor, got {type(x).__name__}")
    _checks.require(OP, "x", x.dim() >= 1, "must have at least 1 dimension", f"shape {tuple(x.shape)}")
    for name, value in (("split_sizes", split_sizes), ("order", order)):
        _checks.tensor(OP, name, value, _checks.INDICES, ndim=1)
        _checks.near(OP, name, value, x.device)
    _checks.shape(OP, "order", order, split_sizes.shape)
    readable = on_host(split_sizes) and on_host(order)
    if readable or strict():
        _check_values(x, split_sizes.tolist(), order.tolist())
    return torch.ops.mindspeed.sort_chunks(x, *(to_device(value, x.device, torch.int64) for value in (split_sizes, order)))


def _check_values(x: Tensor, sizes: list[int], order: list[int]) -> None:
    _checks.require(OP, "split_sizes", min(sizes, default=0) >= 0, "must not be negative", sizes)
    _checks.require(OP, "split_sizes", sum(sizes) == x.shape[0], f"must sum to the {x.shape[0]} rows of x", sizes)
    _checks.require(
        OP, "order", sorted(order) == list(range(len(sizes))), f"must be a permutation of {len(sizes)} chunks", order
    )


def _reference(x: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    """One gather: each output row knows its chunk by binary search, and its source by that chunk's two starts."""
    starts = split_sizes.cumsum(0) - split_sizes
    sizes = split_sizes[order]
    ends = sizes.cumsum(0)
    rows = torch.arange(x.shape[0], device=x.device)
    chunk = torch.searchsorted(ends, rows, right=True).clamp_(max=max(order.shape[0] - 1, 0))
    source = starts[order[chunk]] + rows - (ends - sizes)[chunk] if order.numel() else rows
    return x.index_select(0, source)


class _SortChunks(torch.autograd.Function):
    """Keeps sizes and order; backward is the same operator with the inverse order."""

    @staticmethod
    def forward(ctx, x, split_sizes, order):  # noqa: ANN001, ANN205
        ctx.save_for_backward(split_sizes, order)
        return below_autograd("sort_chunks", x, split_sizes, order)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        split_sizes, order = ctx.saved_tensors
        return torch.ops.mindspeed.sort_chunks(dy, split_sizes[order], order.argsort()), None, None


define(
    "sort_chunks(Tensor x, Tensor split_sizes, Tensor order) -> Tensor",
    family="sort_chunks",
    reference=_reference,
    fake=lambda x, split_sizes, order: x.new_empty(x.shape),
    autograd=_SortChunks,
)


@register_kernel("sort_chunks", "aten", devices=("cpu",))
def _cpu(x: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    chunks = x.split(split_sizes.tolist())
    return torch.cat([chunks[place] for place in order.tolist()])
