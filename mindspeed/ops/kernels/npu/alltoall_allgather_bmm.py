"""Expert dispatch and first product: torch_npu has no operator for the whole, so HCCL moves and one kernel each computes.

The bias is added inside the product where their dtypes agree, and activations take 16-bit values as they are, because the kernels
compute in float32 and round once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch_npu
from torch import Tensor
from torch.nn import functional as F

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take
from mindspeed.ops.npu_all_to_all_all_gather_bmm import gathered_tokens, outputs

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "fastgelu": lambda x: torch_npu.npu_fast_gelu(x),
}


@register_kernel(
    "npu_alltoall_allgather_bmm", "npu", devices=("npu",), declines=lambda x, *_, **__: cannot_take("torch.bmm on NPU", x)
)
def alltoall_allgather_bmm(
    x: Tensor, weight: Tensor, group_ep: str, group_ep_worldsize: int, group_tp: str, group_tp_worldsize: int, *,
    bias: Tensor | None = None, shard_type: int = 0, act_type: str = "None", need_allgather_out: bool = False,
    need_activation_feature: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward; `(y1, y2, y3)`."""
    joined = gathered_tokens(x, group_ep, group_ep_worldsize, group_tp, group_tp_worldsize, shard_type)
    bias = None if bias is None else bias.reshape(weight.shape[0], 1, -1)
    if bias is not None and bias.dtype == x.dtype:
        product = torch.baddbmm(bias, joined, weight)
    else:
        product = torch.bmm(joined, weight)
        product = product if bias is None else (product + bias).to(x.dtype)
    return outputs(ACTIVATIONS[act_type.lower()](product), joined, product, need_allgather_out, need_activation_feature)
