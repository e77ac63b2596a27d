"""Matrix product, all-reduce, residual addition and RMSNorm in one operator that writes the sum into the residual."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops._mm_all_reduce_add_rms_norm import check, documented
from mindspeed.ops.comm import comm_name


def npu_mm_all_reduce_add_rms_norm_(
    x1: Tensor,
    x2: Tensor,
    residual: Tensor,
    gamma: Tensor,
    hcom: str | dist.ProcessGroup,
    reduce_op: str = "sum",
    epsilon: float = 1e-06,
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
) -> tuple[Tensor, Tensor]:
    """`y = allreduce(x1 @ x2 + bias) + residual` and `norm_out = rms_norm(y) * gamma`, both like residual.

    Writes y into `residual` and returns `(residual, norm_out)`. x1: [b, s, k] or [m, k], x2: [k, n] (a transposed view is fine), residual: [b, s, n], gamma and bias: [n].
    hcom: a process group or its name. The bias of every rank is added. Inference only. int8 x1 and x2 need `dequant_scale`
    (and an int32 bias), int8 x2 alone `antiquant_scale`; the page docs/ops/npu_mm_all_reduce_add_rms_norm.md has the shapes.
    """
    antiquant = antiquant_scale, antiquant_offset, antiquant_group_size
    check(
        "npu_mm_all_reduce_add_rms_norm_",
        x1,
        x2,
        residual,
        gamma,
        reduce_op,
        epsilon,
        bias,
        antiquant,
        dequant_scale,
        comm_turn,
    )
    norm_out = torch.ops.mindspeed.mm_all_reduce_add_rms_norm_(
        x1,
        x2,
        residual,
        gamma,
        comm_name(hcom),
        epsilon,
        bias,
        antiquant_scale,
        antiquant_offset,
        dequant_scale,
        antiquant_group_size,
    )
    return residual, norm_out


documented("npu_mm_all_reduce_add_rms_norm_", "Tensor(a!) residual", "(Tensor(a!), Tensor)", npu_mm_all_reduce_add_rms_norm_)
