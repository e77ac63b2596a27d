"""Grouped products of `npu_grouped_matmul` and `npu_grouped_matmul_add_` as several families use them."""

# M rows, G groups

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._groups import ENDS, ends_of
from mindspeed.ops.kernels.npu._versions import cannot_take, lacks

ROWS, INNER = 0, 2
"""What a group list divides: the rows of x, or the axis that is summed over."""


INNER_LIMIT, MOST_GROUPS = 65536, 1024


def beyond_limits(name: str, x: Tensor, group_list: Tensor, *inner_sizes: int) -> str | None:
    """Reason why `npu::<name>` cannot take operands with these last dimensions, else None."""
    if reason := cannot_take(name, x):
        return reason
    if max(inner_sizes) >= INNER_LIMIT or not 0 < group_list.numel() <= MOST_GROUPS:
        return f"inner sizes {inner_sizes} or {group_list.numel()} groups are beyond the limits of {name}"
    return None


def product(
    x: Tensor, weight: Tensor, group_list: Tensor, divides: int, list_type: int, bias: Tensor | None = None, **options: object
) -> Tensor:
    # always a tensor: the overload for host lists returns a wrong shape for one 3-D weight
    if group_list.numel() == 1:  # the kernel refuses one size; it is an end as well
        list_type = ENDS
    given = {name: value for name, value in options.items() if value is not None}
    return torch_npu.npu_grouped_matmul(
        [x], [weight], bias=None if bias is None else [bias], group_list=group_list, split_item=3, group_type=divides,
        group_list_type=list_type, **given,
    )[0]  # fmt: skip


def by_rows(
    x: Tensor, weight: Tensor, group_list: Tensor, list_type: int, bias: Tensor | None = None, **options: object
) -> Tensor:
    """`y_g = x_g @ W_g + bias_g`; the kernel does not write rows after the last group, they are set to zero."""
    y = product(x, weight, group_list, ROWS, list_type, bias, **options)
    after = torch.arange(x.shape[0], device=x.device) >= ends_of(group_list, list_type)[-1:]
    return y.masked_fill_(after.unsqueeze(1), 0)


def cannot_accumulate(x: Tensor, dy: Tensor, groups: int, grad: Tensor) -> str | None:
    """Reason why `npu_grouped_matmul_add_` cannot add a product of x and dy to grad, else None."""
    if x.dtype not in (torch.float16, torch.bfloat16) or grad.dtype != torch.float32:
        return f"npu_grouped_matmul_add_ adds 16-bit products to float32, not {x.dtype} to {grad.dtype}"
    sizes = x.shape[-1], dy.shape[-1]
    if max(sizes) >= INNER_LIMIT or not 0 < groups <= MOST_GROUPS:
        return f"inner sizes {sizes} or {groups} groups are beyond the limits of npu_grouped_matmul_add_"
    return lacks("npu_grouped_matmul_add_")
