"""Grouped matrix multiplication with weights stored as int8 (inference)."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._groups import ENDS, SIZES, as_tensor, check_values, host_sizes, spans
from mindspeed.ops._quantised import widened_weight
from mindspeed.ops._registry import alias, define


def npu_weight_quant_gmm(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    *,
    antiquant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Sequence[int] | Tensor | None = None,
    act_type: int = 0,
) -> Tensor:
    """`x_g @ ((W_g + offset_g) * scale_g) + bias_g` for each group of rows; `group_list` holds cumulative ends.

    x: float16 or bfloat16 [M, K]; weight: int8 [G, K, N] (a transposed view is fine); antiquant_scale, antiquant_offset: [G, N] in
    the dtype of x, no offset means 0; bias: [G, N], float16 for float16, float32 for bfloat16. The weight is computed in
    float32 and rounded to the dtype of x before the product. act_type must be 0.
    """
    return _weight_quant_gmm(
        "npu_weight_quant_gmm", ENDS, x, weight, antiquant_scale, antiquant_offset, bias, group_list, act_type
    )


def npu_weight_quant_gmm_v2(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    *,
    antiquant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Sequence[int] | Tensor | None = None,
    act_type: int = 0,
) -> Tensor:
    """As `npu_weight_quant_gmm`, with group sizes in `group_list`."""
    return _weight_quant_gmm(
        "npu_weight_quant_gmm_v2", SIZES, x, weight, antiquant_scale, antiquant_offset, bias, group_list, act_type
    )


def _weight_quant_gmm(
    op: str,
    list_type: int,
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    bias: Tensor | None,
    group_list: Sequence[int] | Tensor | None,
    act_type: int,
) -> Tensor:
    _checks.tensor(op, "x", x, _checks.HALVES, ndim=2)
    _checks.tensor(op, "weight", weight, (torch.int8,), ndim=3)
    _checks.shape(op, "weight", weight, (weight.shape[0], x.shape[1], weight.shape[2]))
    groups, size = weight.shape[0], weight.shape[2]
    for name, value in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        if name == "antiquant_scale" or value is not None:
            _checks.tensor(op, name, value, (x.dtype,))
            _checks.shape(op, name, value, (groups, size))
    if bias is not None:
        _checks.tensor(op, "bias", bias, (torch.float16 if x.dtype == torch.float16 else torch.float32,))
        _checks.shape(op, "bias", bias, (groups, size))
    _checks.option(op, "act_type", act_type, (0,))
    _checks.same_device(op, x=x, weight=weight, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset, bias=bias)
    _checks.forward_only(op, "use npu_gmm with a float weight for training", x, antiquant_scale, antiquant_offset, bias)
    _checks.require(op, "group_list", group_list is not None or groups == 1, "may be left out for a single group only", None)
    group_list = [x.shape[0]] if group_list is None else group_list
    on_device = as_tensor(op, "group_list", group_list, x, list_type, groups)
    check_values(op, "group_list", group_list, x.shape[0], list_type)
    return torch.ops.mindspeed.weight_quant_gmm(x, weight, antiquant_scale, antiquant_offset, bias, on_device, list_type)


def _reference(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    bias: Tensor | None,
    group_list: Tensor,
    group_list_type: int,
) -> Tensor:
    sizes = host_sizes("npu_weight_quant_gmm", "group_list", group_list.tolist(), x.shape[0], group_list_type)
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for index, rows in enumerate(spans(sizes)):
        if rows.stop == rows.start:
            continue
        offset = None if antiquant_offset is None else antiquant_offset[index]
        matrix = widened_weight(weight[index], antiquant_scale[index], offset, x.dtype)
        product = x[rows] @ matrix
        y[rows] = product if bias is None else (product.to(torch.float32) + bias[index].to(torch.float32)).to(x.dtype)
    return y


define(
    "weight_quant_gmm(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset, Tensor? bias,"
    " Tensor group_list, int group_list_type) -> Tensor",
    family="weight_quant_gmm",
    reference=_reference,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[2]),
)
_HEAD = (
    "(Tensor x, Tensor weight, Tensor antiquant_scale, *, Tensor? antiquant_offset=None, Tensor? bias=None,"
    " {list}? group_list=None, int? act_type=0) -> Tensor"
)
alias("npu_weight_quant_gmm.Tensor" + _HEAD.format(list="Tensor"), npu_weight_quant_gmm)
alias("npu_weight_quant_gmm.List" + _HEAD.format(list="int[]"), npu_weight_quant_gmm)
alias("npu_weight_quant_gmm_v2.Tensor" + _HEAD.format(list="Tensor"), npu_weight_quant_gmm_v2)
