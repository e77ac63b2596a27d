"""Process groups inside context-parallel groups: windows of a ring, Ulysses ranks, their rings, second communicators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

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


class Compared:
    """What the ranks of each group have compared; a group that is destroyed is forgotten, with its threads and sockets."""

    MOST = 256  # forms per group; beyond, all its ranks start anew at the same call

    def __init__(self) -> None:
        self._forms: WeakKeyDictionary[ProcessGroup, set[Held]] = WeakKeyDictionary()

    def of(self, group: ProcessGroup) -> set[Held]:
        """Forms that this group's ranks hold alike."""
        return self._forms.setdefault(group, set())

    def add(self, group: ProcessGroup, form: Held) -> None:
        """Remember one more."""
        forms = self.of(group)
        if len(forms) >= self.MOST:
            forms.clear()
        forms.add(form)


Held = tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, dtype, shape or numbers) of each
COMPARED = Compared()


def check_alike(group: ProcessGroup, **held: Tensor | tuple[int, ...]) -> None:
    """Compare what the ranks of a group hold when it is seen for the first time, so that none waits for ever.

    Shapes that were compared once cost nothing any more. A rank that comes with new ones while others go on with known
    ones waits for them as long as the group's timeout lets it, and says so.

    Args:
        held: tensors by name, of which dtype and shape must agree, or numbers that must.

    Raises:
        ValueError: ranks hold different shapes.
        RuntimeError: the others did not come to compare.
    """
    form = tuple((name, *_form(value)) for name, value in held.items())
    if form not in COMPARED.of(group):
        _compare(group, form)
        COMPARED.add(group, form)


def _form(value: Tensor | tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch."), tuple(value.shape)
    return "", value


def _compare(group: ProcessGroup, held: Held) -> None:
    names = " and ".join(", ".join(name for name, *_ in held).rsplit(", ", 1))
    told: list[str] = [""] * dist.get_world_size(group)
    mine = ", ".join(f"{name} {numbers} {dtype}".rstrip() for name, dtype, numbers in held)
    try:
        dist.all_gather_object(told, mine, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"context parallelism: rank {dist.get_rank(group)} holds {mine} for the first time, and the other ranks of its group did "
            "not come to compare; they may go on with shapes they know. All ranks must hold equally shaped tensors"
        ) from error
    if len(set(told)) > 1:
        listed = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(told))
        raise ValueError(f"context parallelism: ranks of one group must hold equally shaped {names}, got {listed}")


def _distinct(groups: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each group once, in the order of their first ranks."""
    return sorted(set(groups))
