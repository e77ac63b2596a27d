"""Draw where tokens live under each context-parallel algorithm, and which rank computes which scores when.

    python scripts/draw_context_parallel_layouts.py docs/images/context-parallel

Everything shown is computed by the code that training runs: layouts, tiles and routes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from mindspeed.core.context_parallel.layout import SequenceLayout, positions_of
from mindspeed.core.context_parallel.placement import Segments
from mindspeed.core.context_parallel.plan import GATHER, HYBRID, RING, ULYSSES, ContextPlan
from mindspeed.core.context_parallel.ring_attention import RingRoute

LENGTH = 64
DOCUMENTS = ((0, 18, 29, 64),)
PLANS = {
    "ring": (ContextPlan(RING, 4), None, "Ring: zigzag, 4 ranks"),
    "ring-general": (ContextPlan(RING, 4, mask_type="general"), None, "Ring with --attention-mask-type general: plain blocks"),
    "double-ring": (ContextPlan(RING, 4, window=2), None, "Double ring: windows of 2 among 4 ranks"),
    "ulysses": (ContextPlan(ULYSSES, 4), None, "Ulysses: 4 ranks share the heads inside attention"),
    "hybrid": (ContextPlan(HYBRID, 4, degree=2), None, "Hybrid: rings of 2, heads shared by 2"),
    "all-gather": (ContextPlan(GATHER, 4), None, "All-gather of keys and values, 4 ranks"),
    "documents": (ContextPlan(RING, 2), DOCUMENTS, "Ring with documents that end at 18, 29 and 64, each in zigzag"),
}
PALETTE = ["#ffffff", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]


def held(layout: SequenceLayout) -> torch.Tensor:
    """[ranks, S]: rank + 1 where a rank holds a token, else 0."""
    table = torch.zeros(layout.ranks, layout.length)
    for rank in range(layout.ranks):
        table[rank, layout.index(rank).flatten()] = rank + 1
    return table


def computed(layout: SequenceLayout, plan: ContextPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, S] twice: ring rank + 1 that computes a score, and the step at which it does; 0 where nothing is visible."""
    owner, step_of = torch.zeros(layout.length, layout.length), torch.zeros(layout.length, layout.length)
    ranks = layout.ring if plan.algorithm != GATHER else layout.ranks
    for rank in range(ranks):
        route = RingRoute(rank, ranks, plan.window)
        for step, at in enumerate(route.steps()):
            rows, keys = _segments(layout, plan, rank), _segments(layout, plan, at.block)
            mark = 1 if plan.algorithm == GATHER else step + 1
            for tile in _tiles(layout, plan, rank, at.block):
                row_positions, key_positions = positions_of(rows)[tile.rows], positions_of(keys)[tile.keys]
                area = range(len(row_positions)), range(len(key_positions))
                hidden = tile.visible.mask(*area, torch.device("cpu"))
                seen = torch.ones(len(area[0]), len(area[1]), dtype=torch.bool) if hidden is None else ~hidden
                places = torch.meshgrid(row_positions, key_positions, indexing="ij")
                owner[places[0][seen], places[1][seen]] = rank + 1
                step_of[places[0][seen], places[1][seen]] = mark
    return owner, step_of


def _segments(layout: SequenceLayout, plan: ContextPlan, rank: int) -> Segments:
    return layout.segments(rank) if plan.algorithm == GATHER else layout.block(rank)


def _tiles(layout: SequenceLayout, plan: ContextPlan, row: int, column: int):  # noqa: ANN202 - tuple of tiles
    from mindspeed.core.context_parallel.layout import tiles_between

    return tiles_between(_segments(layout, plan, row), _segments(layout, plan, column), layout.rule(), False)


def draw(name: str, folder: Path) -> None:
    """One picture: who holds which token, who computes which score, and when."""
    plan, boundaries, title = PLANS[name]
    layout = plan.layout(LENGTH, boundaries=boundaries)
    if boundaries is not None:  # documents this short would be left whole in training; the picture shows the cut
        layout = SequenceLayout(LENGTH, ring=plan.ring, placement="document_zigzag", boundaries=boundaries)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), width_ratios=(1.25, 1, 1), layout="constrained")
    figure.suptitle(title, fontsize=13)
    _picture(axes[0], held(layout), "tokens held outside attention", "position", "rank", aspect="auto")
    axes[0].set_yticks(range(layout.ranks))
    owner, step = computed(layout, plan)
    what = "ring rank" if plan.algorithm == HYBRID else "rank"
    who = "all ranks, each for its heads" if plan.algorithm == ULYSSES else f"{what} that computes a score"
    _picture(axes[1], owner, who, "key", "query")
    _picture(axes[2], step, "step at which it does", "key", "query")
    _legend(axes[0], held(layout), 1)
    if plan.algorithm != ULYSSES:
        _legend(axes[1], owner, 1)
    _legend(axes[2], step, 0)
    figure.savefig(folder / f"{name}.png", dpi=80)
    plt.close(figure)


def _picture(axis: Axes, table: torch.Tensor, title: str, across: str, down: str, aspect: str = "equal") -> None:
    axis.imshow(
        table.numpy(), cmap=ListedColormap(PALETTE), vmin=0, vmax=len(PALETTE) - 1, aspect=aspect, interpolation="nearest"
    )
    axis.set(title=title, xlabel=across, ylabel=down)


def _legend(axis: Axes, table: torch.Tensor, shift: int) -> None:
    """Colours by rank (from 0) or step (from 1)."""
    values = [int(value) for value in table.unique() if value > 0]
    handles = [plt.Rectangle((0, 0), 1, 1, color=PALETTE[value], label=str(value - shift)) for value in values]
    axis.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        fontsize=9,
        frameon=False,
        ncols=len(handles),
        handlelength=1,
    )


def main() -> None:
    """Write one PNG per layout."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in PLANS:
        draw(name, folder)


if __name__ == "__main__":
    main()
