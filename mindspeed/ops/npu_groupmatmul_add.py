"""Weight gradient accumulation of grouped matrix multiplication: `grad[g] += x_g^T @ dy_g` in place."""

# M rows, G groups, K input size, N output size

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._groups import ENDS, as_tensor, check_values, host_sizes, spans
from mindspeed.ops._registry import define
from mindspeed.ops.npu_matmul_add import add_product

OP = "npu_groupmatmul_add_fp32"


def npu_groupmatmul_add_fp32(x: Tensor, dy: Tensor, grouplist: Sequence[int] | Tensor, grad: Tensor) -> None:
    """Add `x_g^T @ dy_g` of every group to float32 `grad` in place.

    x: [M, K], dy: [M, N], one float dtype. grouplist: cumulative ends, list of int or int64 tensor. grad: contiguous, G*K*N
    elements in any shape, seen as [G, K, N]. Groups without rows are left alone.
    """
    _checks.tensor(OP, "x", x, ndim=2)
    _checks.tensor(OP, "dy", dy, ndim=2)
    _checks.dtype_of(OP, "dy", dy, x.dtype)
    _checks.shape(OP, "dy", dy, (x.shape[0], dy.shape[1]))
    _checks.tensor(OP, "grad", grad, (torch.float32,))
    _checks.require(OP, "grad", grad.is_contiguous(), "must be contiguous", f"strides {grad.stride()}")
    _checks.require(OP, "grad", not grad.requires_grad, "must not require grad", "requires_grad=True")
    groups = as_tensor(OP, "grouplist", grouplist, x, ENDS, None)
    size = len(grouplist) * x.shape[1] * dy.shape[1]
    _checks.require(OP, "grad", grad.numel() == size, f"must have G*K*N = {size} elements", f"shape {tuple(grad.shape)}")
    _checks.same_device(OP, x=x, dy=dy, grad=grad)
    check_values(OP, "grouplist", grouplist, x.shape[0], ENDS)
    with torch.no_grad():
        torch.ops.mindspeed.groupmatmul_add_(x, dy, groups, grad.view(len(grouplist), x.shape[1], dy.shape[1]))


def _reference(x: Tensor, dy: Tensor, group_list: Tensor, grad: Tensor) -> None:
    sizes = host_sizes(OP, "grouplist", group_list.tolist(), x.shape[0], ENDS)
    for index, rows in enumerate(spans(sizes)):
        if rows.stop > rows.start:
            add_product(grad[index], x[rows], dy[rows])


define(
    "groupmatmul_add_(Tensor x, Tensor dy, Tensor group_list, Tensor(a!) grad) -> ()",
    family="groupmatmul_add",
    reference=_reference,
    fake=lambda x, dy, group_list, grad: None,
)
