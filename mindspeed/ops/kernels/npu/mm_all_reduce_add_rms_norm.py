"""Product and all-reduce in one kernel, addition and RMSNorm in the next: torch_npu has no operator for all four."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.comm import comm_name, resolve
from mindspeed.ops.kernels.npu._versions import lacks

OP, NAME = "npu_mm_all_reduce_add_rms_norm", "npu_mm_all_reduce_base"


RANKS = (1, 2, 4, 8)
INNER_LIMIT = 65536  # of quantised operands


def _declines(x1: Tensor, x2: Tensor, residual: Tensor, gamma: Tensor, hcom: str, *rest: object) -> str | None:
    if residual.dtype == torch.float32:
        return f"{NAME} takes 16-bit and int8 operands only"
    if x2.dtype == torch.int8 and x2.shape[0] >= INNER_LIMIT:
        return f"{NAME} takes inner sizes of int8 operands below {INNER_LIMIT}, not {x2.shape[0]}"
    size = dist.get_world_size(resolve(OP, "hcom", hcom))
    if size not in RANKS:
        return f"{NAME} takes groups of {', '.join(map(str, RANKS))} ranks, not {size}"
    return lacks(NAME, *_quantisation(*rest[2:])) or lacks("npu_add_rms_norm")


def _quantisation(
    antiquant_scale: Tensor | None, antiquant_offset: Tensor | None, dequant_scale: Tensor | None, antiquant_group_size: int
) -> dict[str, object]:
    """Those arguments that say something; an operator without them must not be asked."""
    named = {
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
        "dequant_scale": dequant_scale,
        "antiquant_group_size": antiquant_group_size or None,
    }
    return {name: value for name, value in named.items() if value is not None}


def _parts(
    x1: Tensor, x2: Tensor, residual: Tensor, gamma: Tensor, hcom: str, epsilon: float, bias: Tensor | None,
    *quantisation: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, norm_out)."""
    given = _quantisation(*quantisation)
    handle = comm_name(resolve(OP, "hcom", hcom))
    total = torch_npu.npu_mm_all_reduce_base(x1.contiguous(), x2, handle, reduce_op="sum", bias=bias, **given)
    norm_out, _, y = torch_npu.npu_add_rms_norm(total.view(residual.shape), residual, gamma, epsilon)
    return y, norm_out


@register_kernel("mm_all_reduce_add_rms_norm", "npu", devices=("npu",), declines=_declines)
def mm_all_reduce_add_rms_norm(x1: Tensor, x2: Tensor, residual: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """`(y, norm_out)`."""
    return _parts(x1, x2, residual, *rest)


@register_kernel("mm_all_reduce_add_rms_norm_", "npu", devices=("npu",), declines=_declines)
def mm_all_reduce_add_rms_norm_(x1: Tensor, x2: Tensor, residual: Tensor, *rest: object) -> Tensor:
    """norm_out; y goes to residual."""
    y, norm_out = _parts(x1, x2, residual, *rest)
    residual.copy_(y)
    return norm_out
