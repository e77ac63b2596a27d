"""Getters of the process groups inside this rank's context-parallel group, for programs that use them directly.

The groups exist from the host's `initialize_model_parallel` to its `destroy_model_parallel`. Every getter raises
`RuntimeError` naming the flag that a missing group needs.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from mindspeed.core.context_parallel.groups import ACTIVE, ContextGroups

_FLAGS = {
    "cp2": "--use-cp-send-recv-overlap with a ring algorithm",
    "cp_ulysses": "--ulysses-degree-in-cp with a hybrid algorithm",
    "cp_ring": "--ulysses-degree-in-cp with a hybrid algorithm",
    "cp_ring_intra": "--cp-window-size above 1",
    "cp_ring_intra_overlap": "--cp-window-size above 1 and --use-cp-send-recv-overlap",
}


def get_context_parallel_group_for_send_recv_overlap() -> ProcessGroup:
    """The ring's ranks again, with a communicator of their own."""
    return _group("cp2")


def get_context_parallel_group_for_hybrid_ulysses() -> ProcessGroup:
    """Ranks that share heads in a hybrid algorithm."""
    return _group("cp_ulysses")


def get_context_parallel_world_size_for_hybrid_ulysses() -> int:
    """Number of ranks that share heads."""
    return dist.get_world_size(_group("cp_ulysses"))


def get_context_parallel_rank_for_hybrid_ulysses() -> int:
    """Place among the ranks that share heads."""
    return dist.get_rank(_group("cp_ulysses"))


def get_context_parallel_global_ranks_for_hybrid_ulysses() -> list[int]:
    """Global ranks of those that share heads."""
    return _members("cp_ulysses")


def get_context_parallel_group_for_hybrid_ring() -> ProcessGroup:
    """Ranks of this rank's ring in a hybrid algorithm."""
    return _group("cp_ring")


def get_context_parallel_world_size_for_hybrid_ring() -> int:
    """Number of ranks of the ring."""
    return dist.get_world_size(_group("cp_ring"))


def get_context_parallel_rank_for_hybrid_ring() -> int:
    """Place in the ring."""
    return dist.get_rank(_group("cp_ring"))


def get_context_parallel_global_ranks_for_hybrid_ring() -> list[int]:
    """Global ranks of the ring, in its order."""
    return _members("cp_ring")


def get_context_parallel_group_for_intra_window() -> ProcessGroup:
    """Ranks of this rank's window of a double ring."""
    return _group("cp_ring_intra")


def get_context_parallel_group_for_intra_window_send_recv_overlap() -> ProcessGroup:
    """The window's ranks again, with a communicator of their own."""
    return _group("cp_ring_intra_overlap")


def get_context_parallel_global_ranks_for_intra_window() -> list[int]:
    """Global ranks of the window."""
    return _members("cp_ring_intra")


def get_context_parallel_global_ranks_for_inter_window_kv() -> list[int]:
    """Global ranks that keys and values visit from window to window, this rank first: the same place in each window."""
    return _between_windows(0)


def get_context_parallel_global_ranks_for_inter_window_dkv() -> list[int]:
    """The like for gradients of keys and values, which move one place further in each window."""
    return _between_windows(1)


def _between_windows(shift: int) -> list[int]:
    window = len(_members("cp_ring_intra"))
    groups = _groups()
    ring = list(dist.get_process_group_ranks(groups.get("cp_ring")))
    outer, inner = divmod(ring.index(dist.get_rank()), window)
    windows = len(ring) // window
    return [ring[(outer + step) % windows * window + (inner + shift * step) % window] for step in range(windows)]


def _groups() -> ContextGroups:
    if ACTIVE.groups is None:
        raise RuntimeError(
            "context-parallel groups do not exist: they are made by initialize_model_parallel with --context-parallel-size above 1"
        )
    return ACTIVE.groups


def _group(name: str) -> ProcessGroup:
    found = _groups().extra.get(name)
    if found is None:
        raise RuntimeError(f"this run has no group {name}: it needs {_FLAGS[name]}")
    return found


def _members(name: str) -> list[int]:
    _group(name)
    return list(_groups().members[name])
