"""Operators behind `mindspeed.ops.lcal_functional`: products joined with a collective, written into given tensors.

    coc_matmul_all_reduce_      output[m, n]   = allreduce(input1[m, k] @ weight[k, n])
    coc_all_gather_matmul_      output[m, n]   = allgather(input1[m/w, k]) @ weight[k, n]; the gathered rows go to comm_output[m, k]
    coc_matmul_reduce_scatter_  output[m/w, n] = reducescatter(input1[m, k] @ weight[k, n])

The plain form cuts the rows into chunks, so that one chunk computes while another one is on its way. `group` is a `group_name`.
"""

# m rows, k inner size, n output size, w ranks

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops._registry import define, register_kernel
from mindspeed.ops._symmetric_memory import obstacle
from mindspeed.ops.comm import resolve

OP = "coc_ops"


def _slices(rows: int, chunks: int) -> list[slice]:
    chunks = max(1, min(chunks, rows))
    bounds = [rows * index // chunks for index in range(chunks + 1)]
    return [slice(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def _matmul_all_reduce(input1: Tensor, weight: Tensor, output: Tensor, group: str, chunks: int) -> None:
    ranks = resolve(OP, "group", group)
    pending = []
    for rows in _slices(output.shape[0], chunks):
        torch.mm(input1[rows], weight, out=output[rows])
        pending.append(dist.all_reduce(output[rows], group=ranks, async_op=True))
    for work in pending:
        work.wait()


def _all_gather_matmul(
    input1: Tensor, weight: Tensor, output: Tensor, comm_output: Tensor | None, group: str, chunks: int
) -> None:
    ranks = resolve(OP, "group", group)
    size = dist.get_world_size(ranks)
    part, inner = input1.shape
    results = output.view(size, part, output.shape[1])
    kept = None if comm_output is None else comm_output.view(size, part, inner)
    for rows, gathered in _gathered_chunks(input1, ranks, _slices(part, chunks)):
        results[:, rows] = (gathered.flatten(0, 1) @ weight).view_as(results[:, rows])
        if kept is not None:
            kept[:, rows] = gathered


def _gathered_chunks(input1: Tensor, group: dist.ProcessGroup, slices: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, [w, rows, k]) chunk by chunk; the next chunk is on its way while the caller works on this one."""
    size = dist.get_world_size(group)

    def start(rows: slice) -> tuple[Tensor, dist.Work]:
        part = input1[rows].contiguous()
        target = part.new_empty(size, *part.shape)
        return target, dist.all_gather_into_tensor(target.flatten(0, 1), part, group=group, async_op=True)

    coming = start(slices[0])
    for index, rows in enumerate(slices):
        target, work = coming
        if index + 1 < len(slices):
            coming = start(slices[index + 1])
        work.wait()
        yield rows, target


def _matmul_reduce_scatter(input1: Tensor, weight: Tensor, output: Tensor, group: str, chunks: int) -> None:
    """A chunk takes the same rows of every rank's part."""
    ranks = resolve(OP, "group", group)
    size = dist.get_world_size(ranks)
    parts = input1.reshape(size, input1.shape[0] // size, input1.shape[1])
    pending = []
    for rows in _slices(output.shape[0], chunks):
        product = parts[:, rows].flatten(0, 1) @ weight
        target = output.new_empty(product.shape[0] // size, product.shape[1])
        pending.append((rows, target, product, dist.reduce_scatter_tensor(target, product, group=ranks, async_op=True)))
    for rows, target, _, work in pending:
        work.wait()
        output[rows] = target


def _nothing(*_: object) -> None:
    """Results are written to the arguments."""


define(
    "coc_matmul_all_reduce_(Tensor input1, Tensor weight, Tensor(a!) output, str group, int chunks) -> ()",
    family="coc_ops",
    reference=_matmul_all_reduce,
    fake=_nothing,
)
define(
    "coc_all_gather_matmul_(Tensor input1, Tensor weight, Tensor(a!) output, Tensor(b!)? comm_output, str group, int chunks)"
    " -> ()",
    family="coc_ops",
    reference=_all_gather_matmul,
    fake=_nothing,
)
define(
    "coc_matmul_reduce_scatter_(Tensor input1, Tensor weight, Tensor(a!) output, str group, int chunks) -> ()",
    family="coc_ops",
    reference=_matmul_reduce_scatter,
    fake=_nothing,
)


# ---- CUDA: peers read and write each other's memory ---------------------------------------------------------------------------


def _declines(*arguments: object) -> str | None:
    return obstacle(resolve(OP, "group", arguments[-2]))


@register_kernel("coc_all_gather_matmul_", "aten", devices=("cuda",), declines=_declines)
def _all_gather_matmul_peers(
    input1: Tensor, weight: Tensor, output: Tensor, comm_output: Tensor | None, group: str, chunks: int
) -> None:
    gathered, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(
        input1.contiguous(), [weight], 0, group, return_A=comm_output is not None
    )
    output.copy_(product)
    if comm_output is not None:
        comm_output.copy_(gathered)


@register_kernel("coc_matmul_reduce_scatter_", "aten", devices=("cuda",), declines=_declines)
def _matmul_reduce_scatter_peers(input1: Tensor, weight: Tensor, output: Tensor, group: str, chunks: int) -> None:
    output.copy_(torch.ops.symm_mem.fused_matmul_reduce_scatter(input1.contiguous(), weight, "sum", 0, group))
