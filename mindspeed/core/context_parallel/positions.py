"""Rotary tables of this rank: rows of the full table at the positions that the layout says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.scope import current_layout


@dataclass
class RotaryRows:
    """Cuts rotary tables; remembers the last cut per table, because every layer's fused kernel caches by identity.

    Attributes:
        restart: use positions that restart in each document.
    """

    maker: LayoutMaker
    groups: ContextGroups
    restart: bool = False
    _last: Any = field(default_factory=WeakIdKeyDictionary)

    def rows(self, table: Tensor, dim: int = 0) -> Tensor:
        """Rows of a full table for this rank's tokens.

        Args:
            table: [S, 1 or b, 1, d], rows along `dim`.

        Returns:
            [s, 1 or b, 1, d].
        """
        length = table.shape[dim]
        layout = current_layout()
        if layout is None or layout.length != length:
            layout = self.maker.layout(length)
        if self.maker.plan.size == 1 and not (self.restart and layout.restart_positions):
            return table
        remembered = self._last.get(table)
        if remembered is not None and remembered[0] == layout and remembered[0].order is layout.order:
            return remembered[1]
        cut = self._cut(table, layout, dim)
        self._last[table] = (layout, cut)
        return cut

    def _cut(self, table: Tensor, layout: SequenceLayout, dim: int) -> Tensor:
        rank = 0 if self.groups.cp is None else dist.get_rank(self.groups.cp)
        index = layout.position_ids(rank) if self.restart else layout.index(rank)
        index = index.to(table.device)
        if index.dim() == 1:
            return table.index_select(dim, index)
        # per sample: [b, s] positions of a table [S, 1, 1, d] -> [s, b, 1, d]
        if dim != 0 or table.shape[1] != 1:
            raise ValueError(f"per-sample positions need a rotary table [S, 1, 1, d], got {tuple(table.shape)}")
        return table[:, 0].index_select(0, index.T.reshape(-1)).unflatten(0, (index.shape[1], index.shape[0]))
