"""Operator `gmm` and its backward: products of consecutive groups of rows; public forms in `mindspeed.ops.gmm`."""

# M rows, G groups, K inner size, N output size

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._groups import ENDS, ends_of, host_sizes, spans
from mindspeed.ops._registry import below_autograd, define, register_kernel


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
    dx = _reference(dy, weight.transpose(1, 2), None, group_list, 0, group_list_type) if need_dx else x.new_empty(0)
    dweight, dbias = x.new_empty(0), x.new_empty(0)
    if need_dweight:
        dweight = weight_like(weight).copy_(_reference(x.t(), dy, None, group_list, 2, group_list_type))
    if need_dbias:
        dbias = _group_sums(dy, _sizes(group_list, group_list_type, dy.shape[0]))
    return dx, dweight, dbias


def _group_sums(dy: Tensor, sizes: list[int]) -> Tensor:
    """Gradient of the bias [G, N]: the rows of each group summed in the wide dtype."""
    sums = dy.new_zeros(len(sizes), dy.shape[1], dtype=_checks.wide_dtype(dy))
    for index, rows in enumerate(spans(sizes)):
        sums[index] = dy[rows].sum(0, dtype=sums.dtype)
    return sums.to(bias_dtype(dy))


def bias_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a bias: that of x, and float32 for bfloat16."""
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype


def weight_like(weight: Tensor) -> Tensor:
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
    return (
        x.new_empty(x.shape if need_dx else 0),
        weight_like(weight) if need_dweight else x.new_empty(0),
        x.new_empty((weight.shape[0], weight.shape[2]), dtype=bias_dtype(x)) if need_dbias else x.new_empty(0),
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
        dweight = _weight_gradient(x, dy, sizes, weight_like(weight))
    if need_dbias:
        dbias = _group_sums(dy, sizes)
    return dx, dweight, dbias


# ---- CUDA: torch's grouped product ---------------------------------------------------------------------------------------------
#
# It reads operands through descriptors: addresses and steps between rows are multiples of 16 bytes. The groups cut one dimension
# of `x` (and of a two-dimensional `weight`), which must not be the contiguous one: a group would start anywhere, which the kernel
# finds out on the device, and an assertion there ends the use of the device by this process.

MOST_GROUPS = 1023
_UNIT = 8  # elements of 16 bits in 16 bytes


def _no_grouped_mm(x: Tensor, weight: Tensor, groups: int, capability: tuple[int, int]) -> str | None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no torch.nn.functional.grouped_mm"
    if capability[0] not in (9, 10):
        return "aten's grouped product waits for the host on devices other than those of compute capability 9.x and 10.x"
    if x.dtype != torch.bfloat16:
        return "aten's grouped product takes bfloat16 only"
    uncut = (x.shape[0], weight.shape[1]) if weight.dim() == 2 else (x.shape[1], *weight.shape[1:])
    if any(size % _UNIT for size in uncut):
        return f"aten's grouped product wants sizes that are multiples of {_UNIT}"
    if weight.numel() == 0:
        return "aten's grouped product wants at least one group and column"
    if groups > MOST_GROUPS:
        return f"aten's grouped product takes up to {MOST_GROUPS} groups"
    return None


def is_laid_out(value: Tensor, contiguous_dim: int | None = None) -> bool:
    """Whether aten's grouped product can read a 16-bit [..., rows, columns] tensor whose last or second last dimension is
    contiguous; `contiguous_dim` (-1 or -2) says which one it must be.
    """
    rows, columns = value.shape[-2:]
    row_step, column_step = value.stride()[-2:]
    # in the order in which aten looks: of a single row with both steps 1 it takes the second last dimension
    if row_step == 1 and column_step >= max(1, rows):
        found, step = -2, column_step
    elif column_step == 1 and row_step >= max(1, columns):
        found, step = -1, row_step
    else:
        return False
    aligned = all(size % _UNIT == 0 for size in (step, *value.stride()[:-2])) and value.data_ptr() % 16 == 0
    return aligned and contiguous_dim in (None, found)


def laid_out(value: Tensor, contiguous_dim: int | None = None) -> Tensor:
    """The tensor, or a copy of it where `is_laid_out` says no."""
    if is_laid_out(value, contiguous_dim):
        return value
    if contiguous_dim == -2:
        *lead, rows, columns = value.shape
        return value.new_empty((*lead, columns, rows)).copy_(value.transpose(-2, -1)).transpose(-2, -1)
    return value.new_empty(value.shape).copy_(value)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` with the rows after the last group set to zero, which it leaves uninitialised."""
    ends = ends.to(torch.int32)
    if weight.dim() == 2:
        return torch.nn.functional.grouped_mm(laid_out(x, -2), laid_out(weight, -1), offs=ends)
    y = torch.nn.functional.grouped_mm(laid_out(x, -1), laid_out(weight), offs=ends)
    return _without_rows_after(y, ends)


def _without_rows_after(y: Tensor, ends: Tensor) -> Tensor:
    """Zero the rows from the last end on, in place; the Triton kernel touches no others."""
    if y.is_cuda and importlib.util.find_spec("triton") is not None:
        from mindspeed.ops.kernels.triton._grouped import clear_rows_after

        return clear_rows_after(y, ends)
    return y.masked_fill_((torch.arange(y.shape[0], device=y.device) >= ends[-1:]).unsqueeze(1), 0)


def _declines(x: Tensor, weight: Tensor, bias: Tensor | None, group_list: Tensor, *_: object) -> str | None:
    return _no_grouped_mm(x, weight, group_list.shape[0], torch.cuda.get_device_capability(x.device))


@register_kernel("gmm", "aten", devices=("cuda",), declines=_declines)
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


def _declines_backward(dy: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, *rest: object) -> str | None:
    if rest[-1]:
        return "the gradient of the bias is wanted"
    return _no_grouped_mm(x, weight, group_list.shape[0], torch.cuda.get_device_capability(x.device))


@register_kernel("gmm_backward", "aten", devices=("cuda",), declines=_declines_backward)
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
    ends, dy = ends_of(group_list, group_list_type), laid_out(dy, -1)
    dx, dweight = x.new_empty(0), x.new_empty(0)
    if need_dx:
        dx = grouped_product(dy, weight.transpose(1, 2), ends)
    if need_dweight:
        dweight = weight_like(weight)
        stored = dweight.is_contiguous()
        product = grouped_product(x.t(), dy, ends) if stored else grouped_product(dy.t(), x, ends).transpose(1, 2)
        dweight = dweight.copy_(product) if product.stride() != dweight.stride() else product
    return dx, dweight, x.new_empty(0)
