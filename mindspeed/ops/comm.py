"""Names of process groups, which collective operators take as text so that they can be traced."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def comm_name(group: dist.ProcessGroup | str | None = None) -> str:
    """The name that collective operators accept for a group: the HCCL communicator's on NPU, `group_name` elsewhere.

    `None` means the default group; text is returned as it is.
    """
    if isinstance(group, str):
        return group
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("comm_name: no process group exists; call torch.distributed.init_process_group first")
    group = dist.group.WORLD if group is None else group
    return _hccl_name(group) or group.group_name


def resolve(op: str, argument: str, group: dist.ProcessGroup | str | None) -> dist.ProcessGroup:
    """The live group for a group object, a `group_name` or an HCCL communicator name.

    Raises ValueError listing the known groups if the name belongs to none of them.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{op}: {argument} names a process group, but none exists; call init_process_group first")
    if group is None:
        return dist.group.WORLD
    groups = {candidate.group_name: candidate for candidate in c10d._world.pg_map}
    if group in groups:
        return groups[group]
    # asking must not make communicators: that would wait for ranks that do not ask
    hccl = {name: candidate for candidate in groups.values() if (name := _hccl_name(candidate, make=False))}
    if group in hccl:
        return hccl[group]
    known = sorted([*groups, *hccl])
    raise ValueError(f"{op}: {argument} must name a process group, got {group!r}; known groups: {', '.join(known)}")


def _hccl_name(group: dist.ProcessGroup, make: bool = True) -> str:
    """The communicator name of a group's NPU backend, "" if it has no such backend, or no communicator yet and `make` is off."""
    if torch._C._get_privateuse1_backend_name() != "npu" or "npu" not in {device.type for device in group._device_types}:
        return ""
    backend = group._get_backend(torch.device("npu"))
    rank = dist.get_rank()  # in the world, not in the group: torch_npu compares it with the device
    return backend.get_hccl_comm_name(rank) if make else backend.get_hccl_comm_name(rank, init_comm=False)
