"""What users tell adaptive context parallelism about their mask by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class UserMasks:
    """Grid of needed tiles, and tile masks, as the user gave them."""

    def __init__(self) -> None:
        self.grid: Any = None
        self.masks: Any = None

    def clear(self) -> None:
        """Forget both."""
        self.grid, self.masks = None, None

    def grid_for(self, ranks: int) -> list[list[bool]]:
        """The grid, checked.

        Raises:
            ValueError: not `ranks` x `ranks`.
        """
        grid = self.grid.tolist() if isinstance(self.grid, Tensor) else [list(row) for row in self.grid]
        if len(grid) != ranks or any(len(row) != ranks for row in grid):
            raise ValueError(f"set_adaptive_cp_grid_mask_by_user: expected a grid of {ranks} x {ranks}, got {len(grid)} rows")
        return [[bool(cell) for cell in row] for row in grid]

    def masks_for(self, order: Tensor, schedule: Any, rank: int, ranks: int) -> Sequence[Tensor | None] | None:
        """This rank's tile masks in the order of its tasks, or None."""
        return self.masks(order, schedule, rank, ranks) if callable(self.masks) else self.masks


USER = UserMasks()


def set_adaptive_cp_grid_mask_by_user(grid: Tensor | Sequence[Sequence[bool]] | None) -> None:
    """Say which of the R x R tiles hold anything visible (with `--adaptive-cp-manually-set-mask-list`)."""
    USER.grid = grid


def set_adaptive_cp_mask_list_by_user(
    masks: Sequence[Tensor | None] | Callable[[Tensor, Any, int, int], Sequence[Tensor | None]] | None,
) -> None:
    """Give the masks of this rank's tiles, in the order of its tasks.

    Args:
        masks: bool [s, s] per task, True where hidden, None where all is visible; or a function
            (order, schedule, rank, ranks) that returns them.
    """
    USER.masks = masks
