"""Second expert product and return of the tokens: torch_npu has no operator for the whole; each step is one kernel already."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.npu_bmm_reduce_scatter_all_to_all import composition


def _declines(x: Tensor, *_: object, **__: object) -> str | None:
    return "the kernels have no float64" if x.dtype == torch.float64 else None


register_kernel("npu_bmm_reducescatter_alltoall", "npu", devices=("npu",), declines=_declines)(composition)
