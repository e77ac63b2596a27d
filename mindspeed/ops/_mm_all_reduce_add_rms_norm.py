"""Operators `npu_mm_all_reduce_add_rms_norm` and its in-place form: product, all-reduce, residual addition and RMSNorm."""

# M rows, K inner size, N hidden size

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._quantised import float_scale, integer_product, widened_weight
from mindspeed.ops._registry import alias, define
from mindspeed.ops.comm import resolve

HINT = "use the MC2 linear layers for training"


def check(
    op: str,
    x1: Tensor,
    x2: Tensor,
    residual: Tensor,
    gamma: Tensor,
    reduce_op: str,
    epsilon: float,
    bias: Tensor | None,
    antiquant: tuple[Tensor | None, Tensor | None, int],
    dequant_scale: Tensor | None,
    comm_turn: int,
) -> None:
    """Check the arguments of both forms."""
    _checks.option(op, "reduce_op", reduce_op, ("sum",))
    _checks.option(op, "comm_turn", comm_turn, (0,))
    _checks.tensor(op, "residual", residual, (torch.float16, torch.bfloat16, torch.float32), ndim=(2, 3))
    _checks.tensor(op, "x1", x1, (residual.dtype, torch.int8), ndim=(2, 3))
    _checks.tensor(op, "x2", x2, (residual.dtype, torch.int8), ndim=2)
    _checks.require(op, "x2", x2.shape[0] == x1.shape[-1], f"must have {x1.shape[-1]} rows", tuple(x2.shape))
    size = x2.shape[1]
    rows = x1.shape[:-1].numel()
    fits = residual.shape[-1] == size and residual.numel() == rows * size
    _checks.require(op, "residual", fits, f"must hold {rows} rows of {size}", tuple(residual.shape))
    _checks.tensor(op, "gamma", gamma, (residual.dtype,))
    _checks.shape(op, "gamma", gamma, (size,))
    _checks.require(op, "epsilon", epsilon >= 0, "must not be negative", epsilon)
    scale, offset, _ = antiquant
    integers = x1.dtype == torch.int8, x2.dtype == torch.int8
    if integers == (True, False):
        raise TypeError(f"{op}: x2 must have dtype int8 with int8 x1, got {x2.dtype}")
    if bias is not None:
        _checks.tensor(op, "bias", bias, (torch.int32,) if all(integers) else (residual.dtype,))
        _checks.shape(op, "bias", bias, (size,))
    _check_scales(op, x1, x2, antiquant, dequant_scale)
    tensors = {"bias": bias, "antiquant_scale": scale, "antiquant_offset": offset, "dequant_scale": dequant_scale}
    _checks.same_device(op, x1=x1, x2=x2, residual=residual, gamma=gamma, **tensors)
    _checks.forward_only(op, HINT, x1, x2, residual, gamma, bias)


def _check_scales(
    op: str, x1: Tensor, x2: Tensor, antiquant: tuple[Tensor | None, Tensor | None, int], dequant_scale: Tensor | None
) -> None:
    """Check which scales belong to the dtypes of x1 and x2, their dtypes and shapes."""
    (inner, size), (scale, offset, group_size) = x2.shape, antiquant
    integers, int8_weight = x1.dtype == torch.int8, x2.dtype == torch.int8 != x1.dtype
    for name, value, wanted, rule in (
        ("antiquant_scale", scale, int8_weight, "is for float x1 and int8 x2"),
        ("dequant_scale", dequant_scale, integers, "is for int8 x1 and x2"),
    ):
        _checks.require(op, name, (value is not None) == wanted, rule, "None" if value is None else "a tensor")
    _checks.require(op, "antiquant_offset", offset is None or int8_weight, "needs antiquant_scale", "a tensor")
    grouped = group_size == 0 or (group_size % 32 == 0 and 32 <= group_size <= inner - 1)
    _checks.require(op, "antiquant_group_size", grouped, f"must be 0 or a multiple of 32 in [32, {inner - 1}]", group_size)
    shapes = [(1,), (size,), (1, size)]
    if dequant_scale is not None:
        _checks.tensor(op, "dequant_scale", dequant_scale, (torch.bfloat16, torch.float32, torch.int64, torch.uint64))
        _checks.shape(op, "dequant_scale", dequant_scale, *shapes)
    if group_size:
        shapes.append((-(-inner // group_size), size))
    for name, value in (("antiquant_scale", scale), ("antiquant_offset", offset)):
        if value is not None:
            _checks.tensor(op, name, value, (x1.dtype,))
            _checks.shape(op, name, value, *shapes)


def _sum(
    x1: Tensor,
    x2: Tensor,
    residual: Tensor,
    hcom: str,
    bias: Tensor | None,
    antiquant_scale: Tensor | None,
    antiquant_offset: Tensor | None,
    dequant_scale: Tensor | None,
    antiquant_group_size: int,
) -> Tensor:
    """`allreduce(x1 @ x2 + bias)` in the dtype of residual, shaped like it; one collective."""
    group, rows = resolve("npu_mm_all_reduce_add_rms_norm", "hcom", hcom), x1.flatten(0, -2)
    if dequant_scale is not None:
        product = integer_product(rows, x2)
        product = product if bias is None else product + bias
        product = (product.to(torch.float32) * float_scale(dequant_scale)).to(residual.dtype)
    else:
        if antiquant_scale is not None:
            x2 = widened_weight(x2, antiquant_scale, antiquant_offset, x1.dtype, antiquant_group_size)
        product = rows @ x2 if bias is None else torch.addmm(bias, rows, x2)
    dist.all_reduce(product, group=group)
    return product.view(residual.shape)


def _normalised(y: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    wide = y.to(torch.float32)
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * scale * gamma.to(torch.float32)).to(y.dtype)


def _reference(
    x1: Tensor, x2: Tensor, residual: Tensor, gamma: Tensor, hcom: str, epsilon: float, *quantisation: object
) -> tuple[Tensor, Tensor]:
    total = _sum(x1, x2, residual, hcom, *quantisation)
    y = (total.to(torch.float32) + residual.to(torch.float32)).to(residual.dtype)
    return y, _normalised(y, gamma, epsilon)


def _reference_(
    x1: Tensor, x2: Tensor, residual: Tensor, gamma: Tensor, hcom: str, epsilon: float, *quantisation: object
) -> Tensor:
    residual.add_(_sum(x1, x2, residual, hcom, *quantisation))
    return _normalised(residual, gamma, epsilon)


_QUANTISATION = (
    "Tensor? bias, Tensor? antiquant_scale, Tensor? antiquant_offset, Tensor? dequant_scale, int antiquant_group_size"
)
define(
    f"mm_all_reduce_add_rms_norm(Tensor x1, Tensor x2, Tensor residual, Tensor gamma, str hcom, float epsilon, {_QUANTISATION})"
    " -> (Tensor y, Tensor norm_out)",
    family="mm_all_reduce_add_rms_norm",
    reference=_reference,
    fake=lambda x1, x2, residual, *_: (residual.new_empty(residual.shape), residual.new_empty(residual.shape)),
)
define(
    f"mm_all_reduce_add_rms_norm_(Tensor x1, Tensor x2, Tensor(a!) residual, Tensor gamma, str hcom, float epsilon,"
    f" {_QUANTISATION}) -> Tensor",
    family="mm_all_reduce_add_rms_norm",
    reference=_reference_,
    fake=lambda x1, x2, residual, *_: residual.new_empty(residual.shape),
)
_DOCUMENTED = (
    "Tensor gamma, str hcom, str reduce_op='sum', float epsilon=1e-06, Tensor? bias=None, Tensor? antiquant_scale=None,"
    " Tensor? antiquant_offset=None, Tensor? dequant_scale=None, int antiquant_group_size=0, int comm_turn=0)"
)


def documented(name: str, residual: str, returns: str, function: object) -> None:
    """Define the documented dispatcher name of one of the two forms."""
    alias(f"{name}(Tensor x1, Tensor x2, {residual}, {_DOCUMENTED} -> {returns}", function)
