"""Products joined with a collective through torch_npu's operators, which pipeline computation and communication inside."""

# k inner size

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.comm import comm_name, resolve
from mindspeed.ops.kernels.npu._versions import known, lacks

OP = "coc_ops"
ALL_REDUCE, GATHER, SCATTER = "npu_mm_all_reduce_base", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"
INNER_SIZES = range(256, 65535)


@functools.cache
def _rank_counts() -> tuple[int, ...]:
    """Group sizes that this device's operators take; 16 ranks came with Atlas A3."""
    return (2, 4, 8, 16) if torch_npu.npu.get_device_name().startswith("Ascend910_93") else (2, 4, 8)


def _declines(name: str, input1: Tensor, group: str, counts: tuple[int, ...], inner_sizes: range | None) -> str | None:
    if reason := lacks(name):
        return reason
    if input1.dtype not in (torch.float16, torch.bfloat16):
        return f"{name} takes 16-bit operands only, not {input1.dtype}"
    size = dist.get_world_size(resolve(OP, "group", group))
    if size not in counts:
        return f"{name} takes groups of {', '.join(map(str, counts))} ranks, not {size}"
    if inner_sizes is not None and input1.shape[1] not in inner_sizes:
        return f"{name} takes inner sizes from {inner_sizes.start} to {inner_sizes.stop - 1}, not {input1.shape[1]}"
    return None


def _handle(group: str) -> tuple[str, int]:
    """The communicator's name and the number of ranks."""
    ranks = resolve(OP, "group", group)
    return comm_name(ranks), dist.get_world_size(ranks)


@register_kernel(
    "coc_matmul_all_reduce_",
    "npu",
    devices=("npu",),
    declines=lambda input1, weight, output, group, chunks: _declines(ALL_REDUCE, input1, group, (1, 2, 4, 8), None),
)
def matmul_all_reduce_(input1: Tensor, weight: Tensor, output: Tensor, group: str, chunks: int) -> None:
    """`output = allreduce(input1 @ weight)`; the operator chooses its own chunks."""
    handle, _ = _handle(group)
    output.copy_(torch_npu.npu_mm_all_reduce_base(input1.contiguous(), weight, handle, reduce_op="sum"))


@register_kernel(
    "coc_all_gather_matmul_",
    "npu",
    devices=("npu",),
    declines=lambda input1, weight, output, comm_output, group, chunks: _declines(
        GATHER, input1, group, _rank_counts(), INNER_SIZES
    ),
)
def all_gather_matmul_(
    input1: Tensor, weight: Tensor, output: Tensor, comm_output: Tensor | None, group: str, chunks: int
) -> None:
    """`output = allgather(input1) @ weight`, and the gathered rows to `comm_output`."""
    product, gathered = torch_npu.npu_all_gather_base_mm(
        input1.contiguous(), weight, *_handle(group), **known(GATHER, gather_output=comm_output is not None)
    )
    output.copy_(product)
    if comm_output is not None:
        comm_output.copy_(gathered)


@register_kernel(
    "coc_matmul_reduce_scatter_",
    "npu",
    devices=("npu",),
    declines=lambda input1, weight, output, group, chunks: _declines(SCATTER, input1, group, _rank_counts(), INNER_SIZES),
)
def matmul_reduce_scatter_(input1: Tensor, weight: Tensor, output: Tensor, group: str, chunks: int) -> None:
    """`output = reducescatter(input1 @ weight)`."""
    output.copy_(torch_npu.npu_mm_reduce_scatter_base(input1.contiguous(), weight, *_handle(group), reduce_op="sum"))
