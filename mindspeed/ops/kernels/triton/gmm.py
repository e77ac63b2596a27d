"""Grouped matrix multiplication in Triton: for shapes that torch's grouped product does not take."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._gmm import weight_like
from mindspeed.ops._groups import ends_of
from mindspeed.ops.kernels.triton._grouped import grouped_multiply, grouped_weight_gradient
from mindspeed.ops.kernels.triton._launch import triton_body


def _no_groups(group_list: Tensor) -> str | None:
    return "there are no groups" if group_list.numel() == 0 else None


def _declines(x: Tensor, weight: Tensor, bias: Tensor | None, group_list: Tensor, *_: object) -> str | None:
    return _no_groups(group_list)


@triton_body("gmm", declines=_declines)
def gmm(x: Tensor, weight: Tensor, bias: Tensor | None, group_list: Tensor, group_type: int, group_list_type: int) -> Tensor:
    """Forward of both group types."""
    ends = ends_of(group_list, group_list_type)
    if group_type == 2:
        out = x.new_empty(ends.shape[0], x.shape[0], weight.shape[1])
        return grouped_weight_gradient(x.t(), weight, ends, out, accumulate=False)
    return grouped_multiply(x, weight, bias, ends)


def _declines_backward(dy: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, *_: object) -> str | None:
    return _no_groups(group_list)


@triton_body("gmm_backward", declines=_declines_backward)
def gmm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, group_list_type: int,
    need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight (in its storage layout) and bias."""
    ends, nothing = ends_of(group_list, group_list_type), x.new_empty(0)
    dx = grouped_multiply(dy, weight.transpose(1, 2), None, ends) if need_dx else nothing
    dweight = grouped_weight_gradient(x, dy, ends, weight_like(weight), accumulate=False) if need_dweight else nothing
    return dx, dweight, _group_sums(dy, ends) if need_dbias else nothing


def _group_sums(dy: Tensor, ends: Tensor) -> Tensor:
    """Sum of the rows of each group [G, N]: the product with a column of ones."""
    dtype = torch.float16 if dy.dtype == torch.float16 else torch.float32
    out = torch.empty(ends.shape[0], 1, dy.shape[1], dtype=dtype, device=dy.device)
    return grouped_weight_gradient(dy.new_ones(1, 1).expand(dy.shape[0], 1), dy, ends, out, accumulate=False).squeeze(1)
