"""Several products through `npu_grouped_matmul`, and one all-reduce over their results."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.comm import resolve
from mindspeed.ops.kernels.npu._versions import cannot_take

INNER_LIMIT = 65536


def _declines(x: list[Tensor], weight: list[Tensor], *_: object) -> str | None:
    sizes = max(max(matrix.shape) for matrix in weight)
    if sizes >= INNER_LIMIT:
        return f"inner size {sizes} is beyond the limits of npu_grouped_matmul"
    return next(filter(None, (cannot_take("npu_grouped_matmul", value) for value in x)), None)


@register_kernel("grouped_mat_mul_all_reduce", "npu", devices=("npu",), declines=_declines)
def grouped_mat_mul_all_reduce(x: list[Tensor], weight: list[Tensor], hcomm: str, bias: list[Tensor] | None) -> list[Tensor]:
    """`sum over ranks of x_i @ w_i + mean over ranks of bias_i` for each i."""
    group = resolve("npu_grouped_mat_mul_all_reduce", "hcomm", hcomm)
    rows = [value.flatten(0, -2) for value in x]
    products = torch_npu.npu_grouped_matmul(rows, list(weight), split_item=0, group_type=-1)
    if bias is not None:
        world = dist.get_world_size(group)
        pairs = zip(products, bias, strict=True)
        products = [(product.to(torch.float32) + part.to(torch.float32) / world).to(product.dtype) for product, part in pairs]
    joined = torch.cat([product.flatten() for product in products])
    dist.all_reduce(joined, group=group)
    results = joined.split([product.numel() for product in products])
    shapes = [(*value.shape[:-1], matrix.shape[1]) for value, matrix in zip(x, weight, strict=True)]
    return [part.clone().view(shape) for part, shape in zip(results, shapes, strict=True)]
