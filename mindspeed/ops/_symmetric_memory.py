"""Whether the GPUs of a process group can read and write each other's memory, as `torch.ops.symm_mem` wants it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import socket

import torch
import torch.distributed as dist

OPERATORS = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")


def obstacle(group: dist.ProcessGroup) -> str | None:
    """Why the ranks of `group` cannot share memory, or None if they can; all ranks get the same answer.

    The first call for a group is a collective, which all of its ranks must join.
    """
    return _obstacle(group.group_name, tuple(dist.get_process_group_ranks(group)))


@functools.cache
def _obstacle(group_name: str, ranks: tuple[int, ...]) -> str | None:
    if len(ranks) == 1:
        return "a group of one rank has nothing to send"
    group = dist.distributed_c10d._resolve_process_group(group_name)
    places = _from_all_ranks(group, _place())
    reasons = _from_all_ranks(group, _obstacle_here(places))
    return next((reason for reason in reasons if reason is not None), None)


def _from_all_ranks(group: dist.ProcessGroup, value: object) -> list:
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _place() -> tuple[str, str]:
    """(host, GPU) of this process."""
    return socket.gethostname(), _gpu(torch.cuda.current_device())


def _gpu(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _missing() -> list[str]:
    """The operators that this torch lacks; importing the module defines them, which nothing else in torch does."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.distributed._symmetric_memory")
    return [name for name in OPERATORS if not hasattr(torch.ops.symm_mem, name)]


def _obstacle_here(places: list[tuple[str, str]]) -> str | None:
    """Why this rank cannot reach all of these places, or None."""
    if missing := _missing():
        return f"this torch has no symm_mem::{missing[0]}"
    if len({host for host, _ in places}) > 1:
        return "the ranks of the group are on several hosts"
    if len(set(places)) < len(places):
        return "two ranks of the group share a GPU"
    own = torch.cuda.current_device()
    visible = {_gpu(index): index for index in range(torch.cuda.device_count())}
    for _, gpu in places:
        if gpu not in visible:
            return f"GPU {gpu} of the group is not visible to all of its ranks"
        if visible[gpu] != own and not torch.cuda.can_device_access_peer(own, visible[gpu]):
            return f"GPU {own} has no peer access to GPU {visible[gpu]}"
    return None
