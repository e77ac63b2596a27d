"""Grouped matrix multiplication through `npu_grouped_matmul`, which has no derivative of its own."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._groups import ends_of
from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._grouped import INNER, beyond_limits, by_rows, product

NAME = "npu_grouped_matmul"


@register_kernel(
    "gmm",
    "npu",
    devices=("npu",),
    declines=lambda x, weight, bias, groups, *_: beyond_limits(NAME, x, groups, x.shape[1], weight.shape[-1]),
)
def gmm(x: Tensor, weight: Tensor, bias: Tensor | None, group_list: Tensor, group_type: int, group_list_type: int) -> Tensor:
    """Forward of both group types."""
    if group_type == INNER:
        return product(x, weight, group_list, INNER, group_list_type)
    return by_rows(x, weight, group_list, group_list_type, bias)


@register_kernel(
    "gmm_backward",
    "npu",
    devices=("npu",),
    declines=lambda dy, x, weight, groups, *_: beyond_limits(NAME, x, groups, *weight.shape[1:]),
)
def gmm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, group_list_type: int,
    need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight (in its storage layout) and bias."""
    nothing = x.new_empty(0)
    dx = by_rows(dy, weight.transpose(1, 2), group_list, group_list_type) if need_dx else nothing
    dweight = nothing
    if need_dweight and not weight.is_contiguous() and weight.transpose(1, 2).is_contiguous():
        dweight = product(dy.t(), x, group_list, INNER, group_list_type).transpose(1, 2)
    elif need_dweight:
        dweight = product(x.t(), dy, group_list, INNER, group_list_type)
    return dx, dweight, _group_sums(dy, group_list, group_list_type) if need_dbias else nothing


def _group_sums(dy: Tensor, group_list: Tensor, list_type: int) -> Tensor:
    """Sum of the rows of each group [G, N] in float32; rows after the last group go to a place that is cut off."""
    ends = ends_of(group_list, list_type)
    group = torch.searchsorted(ends, torch.arange(dy.shape[0], device=dy.device), right=True)
    sums = torch.zeros(ends.shape[0] + 1, dy.shape[1], dtype=torch.float32, device=dy.device)
    sums = sums.index_add_(0, group, dy.to(torch.float32))[:-1]
    return sums.to(torch.float16) if dy.dtype == torch.float16 else sums.contiguous()
