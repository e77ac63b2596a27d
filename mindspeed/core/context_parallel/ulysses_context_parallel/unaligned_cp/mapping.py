"""Differentiable exchanges along any pair of dimensions, with pieces of unequal size.

A dimension of `total` entries is cut so that the first `total mod world` ranks hold one more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

GRAD_SCALES = (None, "up", "down")


def cal_split_sizes(dim_size: int, world_size: int) -> list[int]:
    """Sizes of `world_size` pieces of a dimension; the first ones take the remainder."""
    size, remainder = divmod(dim_size, world_size)
    return [size + (rank < remainder) for rank in range(world_size)]


def all_to_all(
    input_: Tensor, process_group: ProcessGroup, scatter_dim: int = 2, gather_dim: int = 1, gather_size: int | None = None
) -> Tensor:
    """Scatter one dimension over the ranks of a group and gather another.

    Args:
        input_: 3-D or 4-D tensor, any dtype.
        gather_size: length of `gather_dim` over all ranks; None when every rank holds equally much.

    Returns:
        Tensor with `scatter_dim` cut to this rank's piece and `gather_dim` whole.

    Raises:
        ValueError: dimensions are equal or out of range, or this rank's length breaks the rule of pieces.
    """
    scatter_dim, gather_dim = _dimension(input_, scatter_dim), _dimension(input_, gather_dim)
    if scatter_dim == gather_dim:
        raise ValueError(f"all_to_all: scatter_dim and gather_dim are both {scatter_dim}; choose two dimensions")
    world, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    local = input_.shape[gather_dim]
    total = local * world if gather_size is None else gather_size
    if local != cal_split_sizes(total, world)[rank]:
        raise ValueError(
            f"all_to_all: rank {rank} of {world} holds {local} entries of dimension {gather_dim}, but its piece of "
            f"gather_size {total} is {cal_split_sizes(total, world)[rank]}"
        )
    return _AllToAll.apply(input_, process_group, scatter_dim, gather_dim, total)


def split_forward_gather_backward(
    input_: Tensor,
    process_group: ProcessGroup,
    dim: int,
    split_sizes: list[int] | None = None,
    grad_scale: str | None = "down",
) -> Tensor:
    """Keep this rank's piece of `dim`; backward gathers the gradients of all pieces.

    Args:
        split_sizes: piece of each rank; None cuts by the rule of pieces.
        grad_scale: "up" multiplies the gradient by the world size, "down" divides it, None leaves it.
    """
    return _Split.apply(input_, process_group, _dimension(input_, dim), split_sizes, _scale(grad_scale, process_group))


def gather_forward_split_backward(
    input_: Tensor,
    process_group: ProcessGroup,
    dim: int,
    gather_sizes: list[int] | None = None,
    grad_scale: str | None = "up",
) -> Tensor:
    """Gather all ranks' pieces along `dim`; backward keeps this rank's piece of the gradient.

    Args:
        gather_sizes: piece of each rank; None when all are as long as this one.
        grad_scale: as in `split_forward_gather_backward`.
    """
    return _Gather.apply(input_, process_group, _dimension(input_, dim), gather_sizes, _scale(grad_scale, process_group))


def exchange(tensor: Tensor, group: ProcessGroup, scatter_dim: int, gather_dim: int, total: int) -> Tensor:
    """The exchange itself, without gradient: one `all_to_all_single` with split sizes."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return tensor
    pieces, lengths = cal_split_sizes(tensor.shape[scatter_dim], world), cal_split_sizes(total, world)
    parts = [part.reshape(-1) for part in tensor.split(pieces, scatter_dim)]
    shapes = [_with(tensor.shape, {scatter_dim: pieces[rank], gather_dim: length}) for length in lengths]
    received = tensor.new_empty(sum(shape.numel() for shape in shapes))
    sizes = [shape.numel() for shape in shapes]
    dist.all_to_all_single(received, torch.cat(parts), sizes, [part.numel() for part in parts], group=group)
    return torch.cat([part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)], gather_dim)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup, scatter_dim: int, gather_dim: int, total: int) -> Tensor:
        ctx.group, ctx.dims, ctx.scattered = group, (scatter_dim, gather_dim), tensor.shape[scatter_dim]
        return exchange(tensor, group, scatter_dim, gather_dim, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        scatter_dim, gather_dim = ctx.dims
        return exchange(grad, ctx.group, gather_dim, scatter_dim, ctx.scattered), None, None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup, dim: int, sizes: list[int] | None, scale: float) -> Tensor:
        ctx.group, ctx.dim, ctx.scale = group, dim, scale
        ctx.sizes = sizes or cal_split_sizes(tensor.shape[dim], dist.get_world_size(group))
        _check_sizes("split_sizes", ctx.sizes, tensor.shape[dim], group)
        return tensor.split(ctx.sizes, dim)[dist.get_rank(group)].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gather_pieces(grad, ctx.group, ctx.dim, ctx.sizes) * ctx.scale, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup, dim: int, sizes: list[int] | None, scale: float) -> Tensor:
        ctx.group, ctx.dim, ctx.scale = group, dim, scale
        ctx.sizes = sizes or [tensor.shape[dim]] * dist.get_world_size(group)
        if len(ctx.sizes) != dist.get_world_size(group) or ctx.sizes[dist.get_rank(group)] != tensor.shape[dim]:
            raise ValueError(
                f"gather_sizes {ctx.sizes} do not fit rank {dist.get_rank(group)} with {tensor.shape[dim]} entries"
            )
        return gather_pieces(tensor, group, dim, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad.split(ctx.sizes, ctx.dim)[dist.get_rank(ctx.group)] * ctx.scale, None, None, None, None


def gather_pieces(tensor: Tensor, group: ProcessGroup, dim: int, sizes: list[int]) -> Tensor:
    """All ranks' pieces joined along `dim`; pieces may differ in length (an exchange, since gloo gathers equal ones only)."""
    world = dist.get_world_size(group)
    if world == 1:
        return tensor
    shapes = [_with(tensor.shape, {dim: size}) for size in sizes]
    counts = [shape.numel() for shape in shapes]
    received = tensor.new_empty(sum(counts))
    copies = tensor.reshape(-1).repeat(world)
    dist.all_to_all_single(received, copies, counts, [tensor.numel()] * world, group=group)
    return torch.cat([part.view(shape) for part, shape in zip(received.split(counts), shapes, strict=True)], dim)


def _check_sizes(name: str, sizes: list[int], total: int, group: ProcessGroup) -> None:
    if len(sizes) != dist.get_world_size(group) or sum(sizes) != total:
        raise ValueError(
            f"{name} {sizes} must be one size for each of {dist.get_world_size(group)} ranks and sum up to {total}"
        )


def _with(shape: torch.Size, changes: dict[int, int]) -> torch.Size:
    return torch.Size(changes.get(dim, size) for dim, size in enumerate(shape))


def _dimension(tensor: Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dimension {dim} is out of range for a tensor of shape {tuple(tensor.shape)}")
    return dim % tensor.dim()


def _scale(grad_scale: str | None, group: ProcessGroup) -> float:
    if grad_scale not in GRAD_SCALES:
        raise ValueError(f"grad_scale {grad_scale!r} must be one of {GRAD_SCALES}")
    world = dist.get_world_size(group)
    return {None: 1.0, "up": float(world), "down": 1.0 / world}[grad_scale]
