"""Second expert product and return of the tokens: torch_npu has no operator for the whole; each step is one kernel already."""

from __future__ import annotations

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import cannot_take
from mindspeed.ops.npu_bmm_reduce_scatter_all_to_all import composition

register_kernel(
    "npu_bmm_reducescatter_alltoall", "npu", devices=("npu",), declines=lambda x, *_, **__: cannot_take("torch.bmm on NPU", x)
)(composition)
