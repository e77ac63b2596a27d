"""Reorder tokens so that fewer of the R x R tiles of a mask hold anything visible.

Rows of the mask that look alike are brought together: their projections on the leading principal components are
clustered, tokens are sorted by cluster, and the order with the fewest non-empty tiles wins; the identity, if none is
better. Pure torch, deterministic for a seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELL = 1024  # side of a coarse cell, tokens
COMPONENTS = 10
CLUSTERS = range(2, 9)
RESTARTS = 3
ROUNDS = 20
SEED = 20240


def coarsened(visible: Tensor, cell: int) -> Tensor:
    """[S, S] bool -> [S / cell, S / cell], True where a cell holds anything visible."""
    side = visible.shape[0] // cell
    return visible.view(side, cell, side, cell).any(3).any(1)


def tile_grid(visible: Tensor, order: Tensor, ranks: int) -> Tensor:
    """[R, R] bool: tiles that hold anything visible when tokens (or cells) stand in `order`."""
    share = visible.shape[0] // ranks
    return visible[order][:, order].view(ranks, share, ranks, share).any(3).any(1)


def best_order(visible: Tensor, ranks: int) -> Tensor:
    """Order [m] of rows and columns with the fewest non-empty tiles.

    Args:
        visible: [m, m] bool, m a multiple of `ranks`.
    """
    identity = torch.arange(visible.shape[0])
    best, best_cost = identity, _cost(tile_grid(visible, identity, ranks))
    features = _features(visible)
    generator = torch.Generator().manual_seed(SEED)
    for clusters in CLUSTERS:
        if clusters > visible.shape[0]:
            break
        for _ in range(RESTARTS):
            order = torch.argsort(_labels(features, clusters, generator), stable=True)
            cost = _cost(tile_grid(visible, order, ranks))
            if cost < best_cost:
                best, best_cost = order, cost
    return best


def remapped_order(visible: Tensor, ranks: int, *, coarse: bool = True) -> Tensor:
    """Order [S] of tokens, from a mask [S, S] of what is visible.

    Args:
        coarse: decide for cells of 1024 x 1024 tokens; off, or impossible for this length, single tokens are moved.
    """
    length = visible.shape[0]
    if not coarse or length % CELL or (length // CELL) % ranks:
        return best_order(visible.cpu(), ranks)
    cells = best_order(coarsened(visible.cpu(), CELL), ranks)
    return (cells[:, None] * CELL + torch.arange(CELL)).flatten()


def _cost(grid: Tensor) -> tuple[int, int]:
    """Non-empty tiles, then how unevenly they lie over devices."""
    per_device = grid.sum(0) + grid.sum(1)
    return int(grid.sum()), int(per_device.max() - per_device.min())


def _features(visible: Tensor) -> Tensor:
    """[m, <= 10] projections of rows on the leading principal components of columns."""
    rows = visible.float()
    rows = rows - rows.mean(0, keepdim=True)
    components = min(COMPONENTS, rows.shape[0])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        _, _, basis = torch.svd_lowrank(rows, q=components, niter=4)
    return rows @ basis


def _labels(features: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means; clusters are numbered by their first member, so that the order of tokens is kept where it can be."""
    centers = features[torch.randperm(features.shape[0], generator=generator)[:clusters]]
    labels = torch.zeros(features.shape[0], dtype=torch.int64)
    for _ in range(ROUNDS):
        fresh = torch.cdist(features, centers).argmin(1)
        if torch.equal(fresh, labels):
            break
        labels = fresh
        sums = torch.zeros_like(centers).index_add_(0, labels, features)
        counts = torch.bincount(labels, minlength=clusters).clamp(min=1)[:, None]
        centers = sums / counts
    first = torch.full((clusters,), features.shape[0]).scatter_reduce_(0, labels, torch.arange(features.shape[0]), "amin")
    return first.argsort().argsort()[labels]
