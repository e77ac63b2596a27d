"""The one place where layouts are made, for batches, rotary tables and core attention alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from mindspeed.core.context_parallel.layout import Boundaries, SequenceLayout
from mindspeed.core.context_parallel.plan import GATHER, ContextPlan
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import STORE


@dataclass(frozen=True)
class Band:
    """Limits on what a row sees besides its layer's rule; None is no limit.

    `rules`: the band alone decides about the future too, also in causal layers.
    """

    past: int | None = None
    future: int | None = None
    rules: bool = False

    def limits(self, causal: bool) -> tuple[int | None, int | None]:
        """(past, future) of a layer."""
        if not causal or self.rules:
            return self.past, self.future
        return self.past, 0 if self.future is None else min(0, self.future)


class Remapper(Protocol):
    """Adds an order and a schedule to a layout."""

    def remapped(self, layout: SequenceLayout) -> SequenceLayout:
        """The layout with order, rounds and mask."""
        ...


@dataclass(frozen=True)
class LayoutMaker:
    """Makes the layout of a micro batch from the plan of the run, the band, and the mask in force.

    Attributes:
        adaptive: remaps tokens by the mask, for the adaptive algorithms.
        mask_on_cpu: a custom mask stays in host memory.
    """

    plan: ContextPlan
    band: Band = Band()
    adaptive: Remapper | None = None
    mask_on_cpu: bool = False

    def layout(self, length: int, *, boundaries: Boundaries | None = None, restart_positions: bool = False) -> SequenceLayout:
        """Layout of `length` tokens, for causal layers.

        Raises:
            ValueError: a mask is set although documents are given, or tiles do not fit.
        """
        if boundaries is not None and STORE.is_set:
            raise ValueError(
                "set_attention_mask: documents are kept apart already; reset the mask with None, or leave them together"
            )
        past, future = self.band.limits(causal=True)
        layout = self.plan.layout(
            length,
            boundaries=boundaries,
            restart_positions=restart_positions,
            custom_mask=self._mask(),
            past=past,
            future=future,
        )
        if STORE.tiles is not None:
            layout = replace(layout, tile_masks=self._tiles(length, STORE.tiles))
        return layout if self.adaptive is None else self.adaptive.remapped(layout)

    def has_mask(self) -> bool:
        """Whether the user set a mask."""
        return STORE.is_set

    def _tiles(self, length: int, tiles: tuple[Tensor | None, ...]) -> Mapping[tuple[int, int], Tensor | None]:
        """The user's tiles by (row, column); a rank asks for its own row only.

        Raises:
            ValueError: tiles do not fit the plan of the run.
        """
        plan = self.plan
        if plan.algorithm == GATHER or self.adaptive is not None or (plan.size > 1 and plan.mask_type != "general"):
            raise ValueError(
                f"set_attention_mask: a list of tiles needs --attention-mask-type general and a ring, Ulysses or hybrid; "
                f"given are {plan.mask_type} and {plan.algorithm}; set the whole mask instead"
            )
        size = length // plan.ring
        if len(tiles) != plan.ring or any(tile is not None and tile.shape[0] != size for tile in tiles):
            given = [None if tile is None else tuple(tile.shape) for tile in tiles]
            raise ValueError(f"set_attention_mask: expected {plan.ring} tiles of [{size}, {size}], got {given}")
        moved = [self._placed(tile) for tile in tiles]
        return {(row, column): tile for row in range(plan.ring) for column, tile in enumerate(moved)}

    def _mask(self) -> Tensor | None:
        """The mask in force, where kernels want it."""
        return self._placed(STORE.custom)

    def _placed(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or self.mask_on_cpu:
            return mask
        from mindspeed.platform import current

        return mask.to(current().device(), non_blocking=True)
