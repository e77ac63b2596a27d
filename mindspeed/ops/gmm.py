"""Grouped matrix multiplication: consecutive groups of rows, each with a weight of its own."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from mindspeed.ops import _checks, npu_groupmatmul_add
from mindspeed.ops._groups import ENDS, SIZES, as_tensor, check_values, ends_of, host_sizes, spans
from mindspeed.ops._registry import alias, below_autograd, define, register_kernel


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
    if getattr(original_weight, "main_grad", None) is None:
        given = "None" if original_weight is None else "a weight without it"
        raise ValueError(f"{op}: original_weight must have a main_grad with gemm_fusion=True, got {given}")
    return GMMFunction.apply(original_weight, x, weight, bias, groups, list_type)


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
        wanted = x.dtype if x.dtype in (torch.float16, torch.float64) else torch.float32
        _checks.tensor(op, "bias", bias, (wanted,))
        _checks.shape(op, "bias", bias, (groups, weight.shape[2]))
    checked = as_tensor(op, "group_list", group_list, x, group_list_type, groups)
    check_values(op, "group_list", group_list, rows, group_list_type)
    return checked


def _sizes(group_list: Tensor, list_type: int, rows: int) -> list[int]:
    return host_sizes("npu_gmm" if list_type == ENDS else "npu_gmm_v2", "group_list", group_list.tolist(), rows, list_type)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, group_list: Tensor, group_type: int, group_list_type: int
) -> Tensor:
    wide = _checks.wide_dtype(x)
    groups = spans(_sizes(group_list, group_list_type, x.shape[1] if group_type == 2 else x.shape[0]))
    if group_type == 2:
        blocks = [x[:, rows].to(wide) @ weight[rows].to(wide) for rows in groups]
        return torch.stack(blocks).to(x.dtype) if blocks else x.new_zeros(0, x.shape[0], weight.shape[1])
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for index, rows in enumerate(groups):
        product = x[rows].to(wide) @ weight[index].to(wide)
        y[rows] = (product if bias is None else product + bias[index].to(wide)).to(x.dtype)
    return y


def _reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    group_list_type: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _checks.wide_dtype(x)
    dx = _reference(dy, weight.transpose(1, 2), None, group_list, 0, group_list_type) if need_dx else x.new_empty(0)
    dweight, dbias = x.new_empty(0), x.new_empty(0)
    if need_dweight:
        dweight = _weight_like(weight).copy_(_reference(x.t(), dy, None, group_list, 2, group_list_type))
    if need_dbias:
        dtype = x.dtype if x.dtype in (torch.float16, torch.float64) else torch.float32
        sums = [dy[rows].to(wide).sum(0) for rows in spans(_sizes(group_list, group_list_type, dy.shape[0]))]
        dbias = torch.stack(sums).to(dtype)
    return dx, dweight, dbias


def _weight_like(weight: Tensor) -> Tensor:
    """An uninitialised gradient in the storage layout of the weight, so that a transposed view needs no copy later."""
    stored_transposed = not weight.is_contiguous() and weight.transpose(1, 2).is_contiguous()
    if stored_transposed:
        return weight.new_empty(weight.shape[0], weight.shape[2], weight.shape[1]).transpose(1, 2)
    return weight.new_empty(weight.shape)


def _fake(x, weight, bias, group_list, group_type, group_list_type):  # noqa: ANN001, ANN202
    if group_type == 2:
        return x.new_empty(group_list.shape[0], x.shape[0], weight.shape[1])
    return x.new_empty(x.shape[0], weight.shape[2])


def _fake_backward(dy, x, weight, group_list, group_list_type, need_dx, need_dweight, need_dbias):  # noqa: ANN001, ANN202
    dtype = x.dtype if x.dtype in (torch.float16, torch.float64) else torch.float32
    return (
        x.new_empty(x.shape if need_dx else 0),
        _weight_like(weight) if need_dweight else x.new_empty(0),
        x.new_empty((weight.shape[0], weight.shape[2]), dtype=dtype) if need_dbias else x.new_empty(0),
    )


class _Gmm(torch.autograd.Function):
    """Keeps x, weight and the group list."""

    @staticmethod
    def forward(ctx, x, weight, bias, group_list, group_type, list_type):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, weight, group_list)
        ctx.list_type, ctx.group_type = list_type, group_type
        return below_autograd("gmm", x, weight, bias, group_list, group_type, list_type)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        if ctx.group_type != 0:
            raise RuntimeError("mindspeed::gmm has a derivative for group_type 0 only")
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.mindspeed.gmm_backward(dy, *ctx.saved_tensors, ctx.list_type, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


define(
    "gmm(Tensor x, Tensor weight, Tensor? bias, Tensor group_list, int group_type, int group_list_type) -> Tensor",
    family="gmm",
    reference=_reference,
    fake=_fake,
    autograd=_Gmm,
)
define(
    "gmm_backward(Tensor dy, Tensor x, Tensor weight, Tensor group_list, int group_list_type, bool need_dx,"
    " bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    family="gmm",
    reference=_reference_backward,
    fake=_fake_backward,
)
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


def _multiply(x: Tensor, weight: Tensor, sizes: list[int], out: Tensor) -> Tensor:
    """`out_g = x_g @ W_g`; one batched product if all groups are equal, else one product per group."""
    used, size = sum(sizes), sizes[0]
    out[used:] = 0
    if size and all(other == size for other in sizes):
        shape = (len(sizes), size)
        torch.bmm(x[:used].view(*shape, x.shape[1]), weight, out=out[:used].view(*shape, out.shape[1]))
        return out
    for index, rows in enumerate(spans(sizes)):
        if rows.stop > rows.start:
            torch.mm(x[rows], weight[index], out=out[rows])
    return out


def _weight_gradient(x: Tensor, dy: Tensor, sizes: list[int], out: Tensor) -> Tensor:
    """`out_g = x_g^T @ dy_g` for out [G, K, N], contiguous or a transposed view of a contiguous tensor."""
    if not out.is_contiguous():
        return _weight_gradient(dy, x, sizes, out.transpose(1, 2)).transpose(1, 2)
    used, size = sum(sizes), sizes[0]
    if size and all(other == size for other in sizes):
        shape = (len(sizes), size)
        return torch.bmm(x[:used].view(*shape, x.shape[1]).transpose(1, 2), dy[:used].view(*shape, dy.shape[1]), out=out)
    for index, rows in enumerate(spans(sizes)):
        if rows.stop > rows.start:
            torch.mm(x[rows].t(), dy[rows], out=out[index])
        else:
            out[index] = 0
    return out


@register_kernel("gmm", "aten", devices=("cpu",))
def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, group_list: Tensor, group_type: int, group_list_type: int) -> Tensor:
    sizes = _sizes(group_list, group_list_type, x.shape[1] if group_type == 2 else x.shape[0])
    if not sizes:
        return _reference(x, weight, bias, group_list, group_type, group_list_type)
    if group_type == 2:
        rows = x.t().contiguous()  # usually x is the transposed view, and this is its original
        return _weight_gradient(rows, weight.contiguous(), sizes, x.new_empty(len(sizes), x.shape[0], weight.shape[1]))
    y = _multiply(x.contiguous(), weight, sizes, torch.empty(x.shape[0], weight.shape[2], dtype=x.dtype))
    if bias is not None:
        for index, rows in enumerate(spans(sizes)):
            y[rows] += bias[index]
    return y


@register_kernel("gmm_backward", "aten", devices=("cpu",))
def _cpu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    group_list_type: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(group_list, group_list_type, dy.shape[0])
    if not sizes:
        return _reference_backward(dy, x, weight, group_list, group_list_type, need_dx, need_dweight, need_dbias)
    dy, x = dy.contiguous(), x.contiguous()
    dx, dweight, dbias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_dx:
        dx = _multiply(dy, weight.transpose(1, 2), sizes, torch.empty(x.shape, dtype=x.dtype))
    if need_dweight:
        dweight = _weight_gradient(x, dy, sizes, _weight_like(weight))
    if need_dbias:
        dtype = x.dtype if x.dtype in (torch.float16, torch.float64) else torch.float32
        dbias = torch.stack([dy[rows].sum(0, dtype=_checks.wide_dtype(x)) for rows in spans(sizes)]).to(dtype)
    return dx, dweight, dbias


def _no_grouped_mm(x: Tensor, weight: Tensor) -> str | None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no torch.nn.functional.grouped_mm"
    if x.dtype != torch.bfloat16:
        return "aten's grouped product takes bfloat16 only"
    if any(size % 8 for size in (*x.shape[-1:], *weight.shape[-2:])):
        return "aten's grouped product wants sizes that are multiples of 8"
    return None


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` with the rows after the last group set to zero, which it leaves uninitialised."""
    y = torch.nn.functional.grouped_mm(x, weight, offs=ends.to(torch.int32))
    if weight.dim() == 2:
        return y
    return y.masked_fill_((torch.arange(x.shape[0], device=x.device) >= ends[-1:]).unsqueeze(1), 0)


@register_kernel("gmm", "aten", devices=("cuda",), declines=lambda x, weight, *_: _no_grouped_mm(x, weight))
def _grouped_mm(
    x: Tensor, weight: Tensor, bias: Tensor | None, group_list: Tensor, group_type: int, group_list_type: int
) -> Tensor:
    ends = ends_of(group_list, group_list_type)
    y = grouped_product(x, weight, ends)
    if bias is None:
        return y
    rows = torch.arange(x.shape[0], device=x.device)
    group = torch.searchsorted(ends, rows, right=True)
    bias = torch.cat([bias, bias.new_zeros(1, bias.shape[1])])  # rows after the last group get none
    return (y.to(bias.dtype) + bias[group]).to(x.dtype)


def _no_grouped_mm_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: object) -> str | None:
    return "the gradient of the bias is wanted" if rest[-1] else _no_grouped_mm(x, weight)


@register_kernel("gmm_backward", "aten", devices=("cuda",), declines=_no_grouped_mm_backward)
def _grouped_mm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    group_list_type: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ends, dy = ends_of(group_list, group_list_type), dy.contiguous()
    dx, dweight = x.new_empty(0), x.new_empty(0)
    if need_dx:
        dx = grouped_product(dy, weight.transpose(1, 2), ends)
    if need_dweight:
        dweight = _weight_like(weight)
        stored = dweight.is_contiguous()
        product = grouped_product(x.t(), dy, ends) if stored else grouped_product(dy.t(), x, ends).transpose(1, 2)
        dweight = dweight.copy_(product) if product.stride() != dweight.stride() else product
    return dx, dweight, x.new_empty(0)
