"""Process groups inside context-parallel groups: windows of a ring, Ulysses ranks, their rings, second communicators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed.core.context_parallel.plan import WITH_DEGREE, WITH_RING, ContextPlan


def consecutive(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Blocks of `size` neighbours: Ulysses ranks, windows."""
    return [tuple(ranks[start : start + size]) for start in range(0, len(ranks), size)]


def strided(ranks: Sequence[int], stride: int) -> list[tuple[int, ...]]:
    """Every `stride`-th rank: rings beside Ulysses."""
    return [tuple(ranks[start::stride]) for start in range(stride)]


def group_members(plan: ContextPlan, ranks: Sequence[int], overlap: bool) -> dict[str, list[tuple[int, ...]]]:
    """Groups that a plan needs inside one context-parallel group, by name.

    Args:
        ranks: global ranks of the context-parallel group, in its order.
        overlap: a second communicator, so that sends and receives run at the same time.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    rings = [tuple(ranks)]
    if plan.algorithm in WITH_DEGREE:
        found["cp_ulysses"] = consecutive(ranks, plan.ulysses)
        rings = found["cp_ring"] = strided(ranks, plan.ulysses)
    if plan.algorithm in WITH_RING:
        if overlap:
            found["cp2"] = list(rings)
        if plan.window > 1:
            windows = [window for ring in rings for window in consecutive(ring, plan.window)]
            found["cp_ring_intra"] = windows
            if overlap:
                found["cp_ring_intra_overlap"] = windows
    return found


@dataclass
class ContextGroups:
    """This rank's groups of a plan; created when the host's groups exist, dropped with them.

    Attributes:
        cp: the host's context-parallel group.
        extra: further groups by name (see `group_members`).
        members: global ranks of each of these.
    """

    cp: ProcessGroup | None = None
    extra: dict[str, ProcessGroup] = field(default_factory=dict)
    members: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def create(
        self,
        plan: ContextPlan,
        cp: ProcessGroup,
        overlap: bool,
        new_group: Callable[..., ProcessGroup] = dist.new_group,
    ) -> None:
        """Create all groups of the job in the same order on every rank, and keep this rank's.

        The context-parallel groups of all ranks are gathered, so that any rank order of the host works.
        """
        self.drop()
        self.cp = cp
        ACTIVE.groups = self
        mine = tuple(dist.get_process_group_ranks(cp))
        everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for ranks in _distinct(everyone):
            for name, groups in group_members(plan, ranks, overlap).items():
                for members in groups:
                    group = new_group(list(members), group_desc=name)
                    if dist.get_rank() in members:
                        self.extra[name], self.members[name] = group, members

    @property
    def rank(self) -> int:
        """Place in the context-parallel group; 0 without one."""
        return 0 if self.cp is None else dist.get_rank(self.cp)

    def drop(self) -> None:
        """Forget (and destroy, while torch.distributed is up) the groups made here."""
        for group in self.extra.values():
            if dist.is_initialized():
                dist.destroy_process_group(group)
        self.cp, self.extra, self.members = None, {}, {}
        if ACTIVE.groups is self:
            ACTIVE.groups = None

    def get(self, name: str) -> ProcessGroup | None:
        """A group by name; "cp_ring" is the context-parallel group where the ring is all of it."""
        if name == "cp_ring":
            return self.extra.get("cp_ring", self.cp)
        return self.extra.get(name)


class Active:
    """The groups that the getters of `parallel_state` answer from: those created last and not dropped."""

    groups: ContextGroups | None = None


ACTIVE = Active()


def check_alike(group: ProcessGroup, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Compare the shapes of the ranks of a group when these are seen for the first time, so that none waits for ever.

    Raises:
        ValueError: ranks hold different shapes.
    """
    _check_once(group, (*q.shape, *k.shape, *v.shape))


@functools.lru_cache(maxsize=256)
def _check_once(group: ProcessGroup, shapes: tuple[int, ...]) -> None:
    from mindspeed.platform import current

    mine = torch.tensor(shapes, dtype=torch.int64, device=current().device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    listed = [tuple(one.tolist()) for one in everyone]
    if len(set(listed)) > 1:
        third = len(shapes) // 3
        told = "; ".join(
            f"rank {rank}: q {one[:third]}, k {one[third : 2 * third]}, v {one[2 * third :]}" for rank, one in enumerate(listed)
        )
        raise ValueError(f"context parallelism: ranks of one group must hold equally shaped q, k and v, got {told}")


def _distinct(groups: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each group once, in the order of their first ranks."""
    return sorted(set(groups))
