"""What a multi-rank test sees of the other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class World:
    """This rank's place among the `size` ranks that run one test body.

    Attributes:
        rank, size: as in the default process group.
        shared_dir: an empty directory, the same on every rank, deleted after the test.
        group: the default process group (gloo).
    """

    rank: int
    size: int
    shared_dir: Path

    @property
    def group(self) -> ProcessGroup:
        """The group of all ranks."""
        group = dist.group.WORLD
        if group is None:
            raise RuntimeError("the test destroyed the default process group; create one before asking for world.group")
        return group

    def my_chunk(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's equal part of a tensor that every rank holds whole: a fresh leaf, contiguous.

        Raises:
            ValueError: the size of `dim` is no multiple of the number of ranks.
        """
        if tensor.shape[dim] % self.size:
            raise ValueError(f"dimension {dim} of {tuple(tensor.shape)} does not divide by {self.size} ranks")
        chunk = tensor.detach().chunk(self.size, dim=dim)[self.rank].contiguous().clone()
        return chunk.requires_grad_(tensor.requires_grad)

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """All ranks' equally shaped parts joined along `dim`; the inverse of `my_chunk`, without gradient."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.detach().contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.group)
