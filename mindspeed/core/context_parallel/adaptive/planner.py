"""From a mask to an order of tokens and a schedule of tiles, the same on all ranks, remembered while the mask stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.core.context_parallel.adaptive.remap import remapped_order, tile_grid
from mindspeed.core.context_parallel.adaptive.schedule import Round, schedule_tiles
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.utils import USER


@dataclass
class AdaptivePlanner:
    """Remaps and schedules.

    Attributes:
        coarse: decide for cells of 1024 tokens.
        dynamic: plan every batch anew, for masks that are changed in place.
        remap: move tokens; off, only the schedule adapts.
        manual: take grid and tile masks from the user.
    """

    groups: ContextGroups
    coarse: bool = True
    dynamic: bool = False
    remap: bool = True
    manual: bool = False
    _known: dict[Any, tuple[Tensor | None, SequenceLayout]] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Mapping[str, Any], groups: ContextGroups) -> AdaptivePlanner:
        """Planner of a run from its arguments by destination name."""
        manual = bool(args.get("adaptive_cp_manually_set_mask_list"))
        return cls(
            groups,
            coarse=not args.get("adaptive_cp_without_coarse"),
            dynamic=bool(args.get("adaptive_cp_dynamic_attn_mask")),
            remap=not args.get("adaptive_cp_only_reschedule") and not manual,
            manual=manual,
        )

    def remapped(self, layout: SequenceLayout) -> SequenceLayout:
        """The layout with order, rounds and the mask that they were made for."""
        key = (layout.length, layout.past, layout.future)
        known = self._known.get(key)
        if known is not None and known[0] is layout.custom_mask and not self.dynamic:
            return known[1]
        hidden = layout.custom_mask if layout.custom_mask is not None else _rule_mask(layout)
        visible = ~hidden.reshape(-1, layout.length, layout.length).all(0).cpu()
        order = self._agreed(remapped_order(visible, layout.ranks, coarse=self.coarse)) if self.remap else None
        order = torch.arange(layout.length) if order is None else order
        rounds = schedule_tiles(self._grid(visible, order, layout.ring))
        tiles = self._tile_masks(order, rounds)
        by_rule = layout.custom_mask is None and tiles is None
        planned = replace(layout, order=order, rounds=rounds, custom_mask=hidden, tile_masks=tiles, planned_by_rule=by_rule)
        self._known[key] = (layout.custom_mask, planned)
        return planned

    def _grid(self, visible: Tensor, order: Tensor, ranks: int) -> list[list[bool]]:
        if self.manual and USER.grid is not None:
            return USER.grid_for(ranks)
        return tile_grid(visible, order, ranks).tolist()

    def _tile_masks(self, order: Tensor, rounds: tuple[Round, ...]) -> dict[tuple[int, int], Tensor | None] | None:
        """The user's masks by tile, for this rank's tasks."""
        ring = self.groups.get("cp_ring")
        if not self.manual or USER.masks is None or ring is None:
            return None
        rank, ranks = dist.get_rank(ring), dist.get_world_size(ring)
        mine = [task for tasks in rounds for task in tasks if task.device == rank]
        masks = USER.masks_for(order, rounds, rank, ranks)
        if masks is None or len(masks) != len(mine):
            count = "none" if masks is None else len(masks)
            raise ValueError(f"set_adaptive_cp_mask_list_by_user: rank {rank} computes {len(mine)} tiles, got {count} masks")
        return {(task.row, task.column): mask for task, mask in zip(mine, masks, strict=True)}

    def _agreed(self, order: Tensor) -> Tensor:
        """The first rank's order: clustering may differ in the last bit between machines."""
        group = self.groups.cp
        if group is None or dist.get_world_size(group) == 1:
            return order
        from mindspeed.platform import current

        shared = order.to(current().device())
        dist.broadcast(shared, dist.get_global_rank(group, 0), group=group)
        return shared.cpu()


def _rule_mask(layout: SequenceLayout) -> Tensor:
    """[S, S] bool, True where the causal rule and the band hide."""
    place = torch.arange(layout.length)
    difference = place[None, :] - place[:, None]
    hidden = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    if layout.future is not None:
        hidden |= difference > layout.future
    if layout.past is not None:
        hidden |= difference < -layout.past
    return hidden
