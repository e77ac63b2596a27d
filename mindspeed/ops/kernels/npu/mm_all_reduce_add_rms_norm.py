"""Product and all-reduce in one kernel, addition and RMSNorm in the next: torch_npu has no operator for all four."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.comm import comm_name, resolve
from mindspeed.ops.kernels.npu._versions import known, lacks

NAME = "npu_mm_all_reduce_base"


def _declines(x1: Tensor, x2: Tensor, residual: Tensor, *_: object) -> str | None:
    if residual.dtype == torch.float32:
        return f"{NAME} takes 16-bit and int8 operands only"
    return lacks(NAME) or lacks("npu_add_rms_norm")


def _parts(
    x1: Tensor, x2: Tensor, residual: Tensor, gamma: Tensor, hcom: str, epsilon: float, bias: Tensor | None,
    antiquant_scale: Tensor | None, antiquant_offset: Tensor | None, dequant_scale: Tensor | None, antiquant_group_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, norm_out)."""
    group = resolve("npu_mm_all_reduce_add_rms_norm", "hcom", hcom)
    quantisation = {
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
        "dequant_scale": dequant_scale,
        "antiquant_group_size": antiquant_group_size,
    }
    given = {name: value for name, value in quantisation.items() if value is not None}
    total = torch_npu.npu_mm_all_reduce_base(x1, x2, comm_name(group), reduce_op="sum", bias=bias, **known(NAME, **given))
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
