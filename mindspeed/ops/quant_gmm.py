"""Grouped matrix multiplication of int8 operands with scales and an activation (inference)."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._activations import BY_NAME
from mindspeed.ops._groups import ENDS, SIZES, as_tensor, check_values, host_sizes, spans
from mindspeed.ops._quantised import float_scale, integer_product, to_int8
from mindspeed.ops._registry import alias, define

ACTIVATIONS = {0: "none", 1: "relu", 2: "gelu_tanh", 4: "fastgelu", 5: "silu"}
SCALES = {torch.float16: (torch.float32,), torch.bfloat16: (torch.bfloat16,), torch.int8: (torch.int64,)}


def npu_quant_gmm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Sequence[int] | Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    act_type: int = 0,
) -> Tensor:
    """`act((x_g @ W_g + bias_g) * scale_g * per_token_scale)` for each group of rows; `group_list` holds cumulative ends.

    x: int8 [M, K]; weight: int8 [G, K, N] (a transposed view is fine); scale: [G, N] or [G, 1], float32 for float16 output,
    bfloat16 for bfloat16, int64 (the bits of a float32) for int8; per_token_scale: float32 [M]; bias: int32 [G, N]. The
    product is exact. output_dtype None means float16. act_type: 0 none, 1 relu, 2 gelu (tanh), 4 fast gelu, 5 silu; int8 output
    takes 0 only and no per_token_scale, and is rounded half to even and saturated.
    """
    return _quant_gmm(
        "npu_quant_gmm", ENDS, x, weight, scale, offset, per_token_scale, bias, group_list, output_dtype, act_type
    )


def npu_quant_gmm_v2(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Sequence[int] | Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    act_type: int = 0,
) -> Tensor:
    """As `npu_quant_gmm`, with group sizes in `group_list`."""
    return _quant_gmm(
        "npu_quant_gmm_v2", SIZES, x, weight, scale, offset, per_token_scale, bias, group_list, output_dtype, act_type
    )


def _quant_gmm(
    op: str,
    list_type: int,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    per_token_scale: Tensor | None,
    bias: Tensor | None,
    group_list: Sequence[int] | Tensor | None,
    output_dtype: torch.dtype | None,
    act_type: int,
) -> Tensor:
    _checks.tensor(op, "x", x, (torch.int8,), ndim=2)
    _checks.tensor(op, "weight", weight, (torch.int8,), ndim=3)
    _checks.shape(op, "weight", weight, (weight.shape[0], x.shape[1], weight.shape[2]))
    groups, size = weight.shape[0], weight.shape[2]
    output_dtype = output_dtype or torch.float16
    _checks.option(op, "output_dtype", output_dtype, tuple(SCALES))
    _checks.tensor(op, "scale", scale, SCALES[output_dtype])
    _checks.shape(op, "scale", scale, (groups, size), (groups, 1))
    _checks.require(op, "offset", offset is None, "must be None", "a tensor")
    if act_type == 3:
        raise NotImplementedError(f"{op}: act_type 3 (erf gelu) is not offered by any device; use 2 for the tanh form")
    _checks.option(op, "act_type", act_type, tuple(ACTIVATIONS))
    if bias is not None:
        _checks.tensor(op, "bias", bias, (torch.int32,))
        _checks.shape(op, "bias", bias, (groups, size))
    if per_token_scale is not None:
        _checks.tensor(op, "per_token_scale", per_token_scale, (torch.float32,))
        _checks.shape(op, "per_token_scale", per_token_scale, (x.shape[0],))
    if output_dtype == torch.int8:
        _checks.require(op, "act_type", act_type == 0, "must be 0 for int8 output", act_type)
        _checks.require(op, "per_token_scale", per_token_scale is None, "must be None for int8 output", "a tensor")
    _checks.same_device(op, x=x, weight=weight, scale=scale, per_token_scale=per_token_scale, bias=bias)
    _checks.require(op, "group_list", group_list is not None or groups == 1, "may be left out for a single group only", None)
    group_list = [x.shape[0]] if group_list is None else group_list
    on_device = as_tensor(op, "group_list", group_list, x, list_type, groups)
    check_values(op, "group_list", group_list, x.shape[0], list_type)
    return torch.ops.mindspeed.quant_gmm(x, weight, scale, per_token_scale, bias, on_device, list_type, output_dtype, act_type)


def _reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    per_token_scale: Tensor | None,
    bias: Tensor | None,
    group_list: Tensor,
    group_list_type: int,
    output_dtype: torch.dtype,
    act_type: int,
) -> Tensor:
    sizes = host_sizes("npu_quant_gmm", "group_list", group_list.tolist(), x.shape[0], group_list_type)
    y = torch.zeros(x.shape[0], weight.shape[2], dtype=output_dtype, device=x.device)
    scale = float_scale(scale)
    for index, rows in enumerate(spans(sizes)):
        if rows.stop == rows.start:
            continue
        product = integer_product(x[rows], weight[index])
        values = (product if bias is None else product + bias[index]).to(torch.float32) * scale[index]
        if per_token_scale is not None:
            values = values * per_token_scale[rows].unsqueeze(1)
        values = BY_NAME[ACTIVATIONS[act_type]](values)
        y[rows] = to_int8(values) if output_dtype == torch.int8 else values.to(output_dtype)
    return y


define(
    "quant_gmm(Tensor x, Tensor weight, Tensor scale, Tensor? per_token_scale, Tensor? bias, Tensor group_list,"
    " int group_list_type, ScalarType output_dtype, int act_type) -> Tensor",
    family="quant_gmm",
    reference=_reference,
    fake=lambda x, weight, scale, per_token_scale, bias, group_list, group_list_type, output_dtype, act_type: x.new_empty(
        (x.shape[0], weight.shape[2]), dtype=output_dtype
    ),
)
_HEAD = (
    "(Tensor x, Tensor weight, Tensor scale, *, Tensor? offset=None, Tensor? per_token_scale=None, Tensor? bias=None,"
    " {list}? group_list=None, ScalarType? output_dtype=None, int? act_type=0) -> Tensor"
)
alias("npu_quant_gmm.Tensor" + _HEAD.format(list="Tensor"), npu_quant_gmm)
alias("npu_quant_gmm.List" + _HEAD.format(list="int[]"), npu_quant_gmm)
alias("npu_quant_gmm_v2.Tensor" + _HEAD.format(list="Tensor"), npu_quant_gmm_v2)
