"""Grouped matrix multiplication: consecutive groups of rows, each with a weight of its own."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from mindspeed.ops import _checks, npu_groupmatmul_add
from mindspeed.ops._gmm import bias_dtype
from mindspeed.ops._groups import ENDS, SIZES, as_tensor, check_values, ends_of
from mindspeed.ops._registry import alias


def npu_gmm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    group_list: Sequence[int] | Tensor | None = None,
    group_type: int = 0,
    gemm_fusion: bool = False,
    original_weight: Tensor | None = None,
) -> Tensor:
    """Multiply each group of rows of `x` by its weight; `group_list` holds cumulative ends.

    group_type 0 (also -1 for one group): x [M, K], weight [G, K, N] (a transposed view is fine), y [M, N] with
    `y_g = x_g @ W_g + bias_g`; rows after the last group are zero. group_type 2: x [K, M], weight [M, N], y [G, K, N] with
    `y_g = x[:, g] @ w[g]`, not differentiable. x and weight share a float dtype; bias [G, N] is float16 for float16, else
    float32. group_list: list of int, or int64 tensor on the CPU or on the device of x.
    gemm_fusion: the weight gradient is added to `original_weight.main_grad` in float32 during backward.
    """
    return _gmm("npu_gmm", ENDS, x, weight, bias, group_list, group_type, gemm_fusion, original_weight)


def npu_gmm_v2(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    group_list: Sequence[int] | Tensor | None = None,
    group_type: int = 0,
    gemm_fusion: bool = False,
    original_weight: Tensor | None = None,
) -> Tensor:
    """As `npu_gmm`, with group sizes in `group_list`."""
    return _gmm("npu_gmm_v2", SIZES, x, weight, bias, group_list, group_type, gemm_fusion, original_weight)


def _gmm(
    op: str,
    list_type: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_list: Sequence[int] | Tensor | None,
    group_type: int,
    gemm_fusion: bool,
    original_weight: Tensor | None,
) -> Tensor:
    groups = npu_gmm_param_verification(
        x, weight, bias=bias, group_list=group_list, group_type=group_type, group_list_type=list_type, op=op
    )
    group_type = max(group_type, 0)
    if not gemm_fusion:
        return torch.ops.mindspeed.gmm(x, weight, bias, groups, group_type, list_type)
    _checks.require(op, "group_type", group_type == 0, "must be 0 with gemm_fusion", group_type)
    _check_main_grad(op, original_weight, weight)
    return GMMFunction.apply(original_weight, x, weight, bias, groups, list_type)


def _check_main_grad(op: str, original_weight: Tensor | None, weight: Tensor) -> None:
    """Check now what backward will add the weight gradient to."""
    main_grad, name = getattr(original_weight, "main_grad", None), "original_weight.main_grad"
    if main_grad is None:
        given = "None" if original_weight is None else "a weight without it"
        raise ValueError(f"{op}: original_weight must have a main_grad with gemm_fusion=True, got {given}")
    _checks.tensor(op, name, main_grad, (torch.float32,))
    size = weight.numel()
    _checks.require(op, name, main_grad.numel() == size, f"must have {size} elements", f"shape {tuple(main_grad.shape)}")
    _checks.require(op, name, main_grad.is_contiguous(), "must be contiguous", f"strides {main_grad.stride()}")
    _checks.same_device(op, weight=weight, **{name: main_grad})


def npu_gmm_param_verification(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    group_list: Sequence[int] | Tensor | None = None,
    group_type: int = 0,
    group_list_type: int = 0,
    op: str = "npu_gmm",
) -> Tensor:
    """Check all arguments of a grouped matrix multiplication; returns the group list as a tensor on the device of x."""
    _checks.tensor(op, "x", x, ndim=2)
    _checks.option(op, "group_type", group_type, (-1, 0, 2))
    _checks.option(op, "group_list_type", group_list_type, (ENDS, SIZES))
    _checks.tensor(op, "weight", weight, ndim=2 if group_type == 2 else 3)
    _checks.dtype_of(op, "weight", weight, x.dtype)
    _checks.same_device(op, x=x, weight=weight, bias=bias)
    rows = x.shape[1] if group_type == 2 else x.shape[0]
    groups = None if group_type == 2 else weight.shape[0]
    if group_list is None:
        _checks.require(op, "group_list", groups == 1, "may be left out for a single group only", "None")
        group_list = [rows]
    if group_type == 2:
        _checks.require(op, "weight", weight.shape[0] == rows, f"must have {rows} rows like x has columns", tuple(weight.shape))
        _checks.require(op, "bias", bias is None, "must be None with group_type 2", "a tensor")
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            raise ValueError(f"{op}: group_type must be 0 for inputs that require grad, got 2")
    else:
        _checks.require(op, "group_type", group_type == 0 or groups == 1, "may be -1 for a single group only", group_type)
        _checks.require(op, "weight", weight.shape[1] == x.shape[1], f"must have inner size {x.shape[1]}", tuple(weight.shape))
    if bias is not None:
        _checks.tensor(op, "bias", bias, (bias_dtype(x),))
        _checks.shape(op, "bias", bias, (groups, weight.shape[2]))
    checked = as_tensor(op, "group_list", group_list, x, group_list_type, groups)
    check_values(op, "group_list", group_list, rows, group_list_type)
    return checked


_OPTIONS = "int? group_type=0, bool? gemm_fusion=False, Tensor? original_weight=None) -> Tensor"
alias(f"npu_gmm.Tensor(Tensor x, Tensor weight, *, Tensor? bias=None, Tensor? group_list=None, {_OPTIONS}", npu_gmm)
alias(f"npu_gmm.List(Tensor x, Tensor weight, *, Tensor? bias=None, int[]? group_list=None, {_OPTIONS}", npu_gmm)
alias(f"npu_gmm_v2.Tensor(Tensor x, Tensor weight, *, Tensor? bias=None, Tensor? group_list=None, {_OPTIONS}", npu_gmm_v2)


class GMMFunction(torch.autograd.Function):
    """Grouped multiplication whose backward adds the weight gradient to `original_weight.main_grad`.

    A Python function around dispatcher operators, because `main_grad` is an attribute that no operator may touch.
    """

    @staticmethod
    def forward(ctx, original_weight, x, weight, bias, group_list, list_type):  # noqa: ANN001, ANN205
        """Keep x, weight and the group list; `original_weight` is remembered for its attributes."""
        ctx.save_for_backward(x, weight, group_list)
        ctx.original_weight, ctx.list_type = original_weight, list_type
        return torch.ops.mindspeed.gmm(x, weight, bias, group_list, 0, list_type)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        """Gradients of x and bias; that of the weight goes into `main_grad`."""
        x, weight, group_list = ctx.saved_tensors
        _, need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        dx, _, dbias = torch.ops.mindspeed.gmm_backward(dy, x, weight, group_list, ctx.list_type, need_dx, False, need_dbias)
        dweight = None
        if need_dweight:
            main_grad = ctx.original_weight.main_grad
            ends = ends_of(group_list, ctx.list_type)
            npu_groupmatmul_add.npu_groupmatmul_add_fp32(x, dy.contiguous(), ends, main_grad)
            dweight = dummy_weight_gradient(ctx.original_weight, weight)
        return None, dx if need_dx else None, dweight, dbias if need_dbias else None, None, None


def dummy_weight_gradient(original_weight: Tensor, weight: Tensor) -> Tensor | None:
    """What backward returns for a weight whose gradient went into `main_grad`; marks the weight as done.

    Megatron's hooks want some gradient to fire: zeros if the weight asks for it (`zero_out_wgrad`), else uninitialised
    memory. A weight without the mark `grad_added_to_main_grad` belongs to a program without such hooks and gets None.
    """
    if not hasattr(original_weight, "grad_added_to_main_grad"):
        return None
    original_weight.grad_added_to_main_grad = True
    make = torch.zeros if getattr(original_weight, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)


def npu_gmm_backward(
    dy: Sequence[Tensor], x: Sequence[Tensor], weight: Sequence[Tensor], group_list: Sequence[int] | Tensor, list_type: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`([dx], [dweight], [])` for lists of one tensor each: the form that published examples call."""
    groups = as_tensor("npu_gmm_backward", "group_list", group_list, x[0], list_type, weight[0].shape[0])
    dx, dweight, _ = torch.ops.mindspeed.gmm_backward(dy[0], x[0], weight[0], groups, list_type, True, True, False)
    return [dx], [dweight], []


GMMFunction.builder = SimpleNamespace(load=lambda: SimpleNamespace(npu_gmm=npu_gmm, npu_gmm_backward=npu_gmm_backward))
