"""Several matrix products and one all-reduce over all of their results (inference)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._groups import ENDS, host_sizes
from mindspeed.ops._registry import define
from mindspeed.ops.comm import comm_name, resolve

OP = "npu_grouped_mat_mul_all_reduce"
MOST = 64


def npu_grouped_mat_mul_all_reduce(
    x: Sequence[Tensor] | Tensor,
    weight: Sequence[Tensor] | Tensor,
    hcomm: str | dist.ProcessGroup,
    *,
    bias: Sequence[Tensor] | Tensor | None = None,
    group_list: Sequence[int] | None = None,
    split_item: int = 0,
    reduce_op: str = "sum",
    comm_turn: int = 0,
) -> list[Tensor]:
    """`y_i = sum over ranks of x_i @ w_i + mean over ranks of bias_i`, with one all-reduce in all.

    split_item 0: lists of x (2- to 6-D) and y; 1: one x split by `group_list` (cumulative ends), a list of y; 2: a list of x, one y;
    3: one x split by `group_list`, one y. weight: a list of [K, N], one [G, K, N], or one [G*K, N]. Up to 64 products. The bias is
    averaged, not added once per rank as in `npu_mm_all_reduce_add_rms_norm`.
    """
    x = [x] if isinstance(x, Tensor) else list(x)
    weight = [weight] if isinstance(weight, Tensor) else list(weight)
    bias = [bias] if isinstance(bias, Tensor) else None if bias is None else list(bias)
    _checks.option(OP, "reduce_op", reduce_op, ("sum",))
    _checks.option(OP, "comm_turn", comm_turn, (0,))
    _checks.option(OP, "split_item", split_item, (0, 1, 2, 3))
    x = _split(x, group_list, split_item)
    weight = _unpacked(weight, len(x))
    _check_products(x, weight, bias)
    _checks.forward_only(OP, "use a differentiable grouped product and an all-reduce of their own", *x, *weight, *(bias or ()))
    results = torch.ops.mindspeed.grouped_mat_mul_all_reduce(x, weight, comm_name(hcomm), bias)
    return [torch.cat(results)] if split_item in (2, 3) else results


def _split(x: list[Tensor], group_list: Sequence[int] | None, split_item: int) -> list[Tensor]:
    """The left operands, one per product."""
    for index, value in enumerate(x):
        _checks.tensor(OP, f"x[{index}]", value)
        _checks.require(OP, f"x[{index}]", 2 <= value.dim() <= 6, "must have 2 to 6 dimensions", tuple(value.shape))
        flat = split_item == 0 or value.dim() == 2
        _checks.require(OP, f"x[{index}]", flat, "must have 2 dimensions for split_item 1 to 3", tuple(value.shape))
    splits = split_item in (1, 3)
    _checks.require(OP, "group_list", (group_list is not None) == splits, "is for split_item 1 and 3", group_list)
    if splits:
        _checks.require(OP, "x", len(x) == 1, "must be one tensor for split_item 1 and 3", len(x))
        ends = [int(end) for end in group_list]
        sizes = host_sizes(OP, "group_list", ends, x[0].shape[0], ENDS)
        _checks.require(OP, "group_list", sum(sizes) == x[0].shape[0], f"must end with {x[0].shape[0]}", ends)
        x = list(x[0].split(sizes))
    _checks.require(OP, "x", 0 < len(x) <= MOST, f"must give 1 to {MOST} products", len(x))
    return x


def _check_products(x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None) -> None:
    _checks.require(OP, "weight", len(weight) == len(x), f"must give {len(x)} matrices", len(weight))
    _checks.require(OP, "bias", bias is None or len(bias) == len(x), f"must give {len(x)} vectors", bias and len(bias))
    bias_dtype = torch.float16 if x[0].dtype == torch.float16 else torch.float32
    for index, (value, matrix) in enumerate(zip(x, weight, strict=True)):
        _checks.dtype_of(OP, f"x[{index}]", value, x[0].dtype)
        _checks.tensor(OP, f"weight[{index}]", matrix, (value.dtype,), ndim=2)
        inner = value.shape[-1]
        _checks.require(OP, f"weight[{index}]", matrix.shape[0] == inner, f"must have {inner} rows", tuple(matrix.shape))
        if bias is not None:
            _checks.tensor(OP, f"bias[{index}]", bias[index], (bias_dtype,))
            _checks.shape(OP, f"bias[{index}]", bias[index], (matrix.shape[1],))
    lists = {"x": x, "weight": weight, "bias": bias or []}
    tensors = {f"{name}[{index}]": value for name, values in lists.items() for index, value in enumerate(values)}
    _checks.same_device(OP, **tensors)


def _unpacked(weight: list[Tensor], count: int) -> list[Tensor]:
    """One matrix per product from a list, one [G, K, N] or one [G*K, N]."""
    for index, value in enumerate(weight):
        _checks.tensor(OP, f"weight[{index}]", value, ndim=(2, 3) if len(weight) == 1 else 2)
    if len(weight) != 1 or (count == 1 and weight[0].dim() == 2):
        return weight
    stacked = weight[0]
    if stacked.dim() == 2:
        fits = stacked.shape[0] % count == 0
        _checks.require(OP, "weight", fits, f"must have rows for {count} matrices", tuple(stacked.shape))
        stacked = stacked.unflatten(0, (count, stacked.shape[0] // count))
    return list(stacked)


def _reference(x: list[Tensor], weight: list[Tensor], hcomm: str, bias: list[Tensor] | None) -> list[Tensor]:
    group = resolve(OP, "hcomm", hcomm)
    world = dist.get_world_size(group)
    parts = []
    for index, (value, matrix) in enumerate(zip(x, weight, strict=True)):
        product = value.flatten(0, -2) @ matrix
        if bias is not None:
            product = (product.to(torch.float32) + bias[index].to(torch.float32) / world).to(value.dtype)
        parts.append(product.flatten())
    joined = torch.cat(parts)
    dist.all_reduce(joined, group=group)
    results = joined.split([part.numel() for part in parts])
    shapes = ((*value.shape[:-1], matrix.shape[1]) for value, matrix in zip(x, weight, strict=True))
    return [part.clone().view(shape) for part, shape in zip(results, shapes, strict=True)]


define(
    "grouped_mat_mul_all_reduce(Tensor[] x, Tensor[] weight, str hcomm, Tensor[]? bias) -> Tensor[]",
    family="grouped_mat_mul_all_reduce",
    reference=_reference,
    fake=lambda x, weight, hcomm, bias: [
        value.new_empty((*value.shape[:-1], matrix.shape[1])) for value, matrix in zip(x, weight, strict=True)
    ],
)
