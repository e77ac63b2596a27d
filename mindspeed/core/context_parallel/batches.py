"""From batches to layouts: every micro batch gets the layout that its forward, and its recomputation, will see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import Boundaries, SequenceLayout, slice_batch
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.scope import layout_scope
from mindspeed.notices import warn_once


class _Pending(threading.local):
    """Between reading a batch and running the model on it; the same thread does both."""

    def __init__(self) -> None:
        self.boundaries: Boundaries | None = None
        self.layout: SequenceLayout | None = None
        self.iterator: Any = None
        self.last: tuple[ReferenceType[Tensor], SequenceLayout] | None = None  # tokens that were cut, and how


@dataclass
class BatchLayouts:
    """Makes the layout of each micro batch, cuts the batch by it, and opens its scope around the model.

    Attributes:
        maker, groups: how sequences are shared out.
        documents: tokens [B, S] -> boundaries of their documents, when attention stays inside documents; else None.
        restart_positions: positions count from 0 in each document.
        tensor_group: tensor-parallel group, whose first rank alone reads data; asked when needed.
    """

    maker: LayoutMaker
    groups: ContextGroups
    documents: Callable[[Tensor], Boundaries] | None = None
    restart_positions: bool = False
    tensor_group: Callable[[], ProcessGroup] | None = None
    _pending: _Pending = field(default_factory=_Pending)

    def note_documents(self, batch: MutableMapping[str, Any] | None) -> None:
        """Find the documents of a batch that this tensor-parallel group has just read, on all of its ranks.

        Args:
            batch: with `tokens` [b, S] on the group's first rank.
        """
        if self.documents is None or self.tensor_group is None:
            return
        group = self.tensor_group()
        shape = flat = None
        if dist.get_rank(group) == 0:
            assert batch is not None
            boundaries = self.documents(batch["tokens"])
            shape, flat = [len(sample) for sample in boundaries], [end for sample in boundaries for end in sample]
        if dist.get_world_size(group) > 1:
            shape, flat = _broadcast_lists(group, shape, flat)
        assert shape is not None and flat is not None
        parts, offset = [], 0
        for size in shape:
            parts.append(tuple(flat[offset : offset + size]))
            offset += size
        self._pending.boundaries = tuple(parts)

    def cut(self, batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """This rank's share of a batch; keeps the order of its entries."""
        length = _length_of(batch)
        if length is None:
            return batch
        layout = self._take_layout(length)
        self._pending.layout = layout
        rank = 0 if self.groups.cp is None else dist.get_rank(self.groups.cp)
        sliced = slice_batch(batch, layout, rank)
        for key in batch:
            batch[key] = sliced[key]
        if isinstance(batch.get("tokens"), Tensor):
            self._pending.last = ref(batch["tokens"]), layout
        return batch

    def _take_layout(self, length: int) -> SequenceLayout:
        boundaries, self._pending.boundaries = self._pending.boundaries, None
        return self.maker.layout(
            length,
            boundaries=boundaries,
            restart_positions=self.restart_positions and boundaries is not None,
        )

    @contextmanager
    def reading_from(self, data_iterator: Any) -> Iterator[None]:
        """Make the iterator of the model chunk known while its forward step runs."""
        before, self._pending.iterator = self._pending.iterator, data_iterator
        try:
            yield
        finally:
            self._pending.iterator = before

    @contextmanager
    def around_model(self, length: int | None = None, *, reads: bool = True, tokens: Tensor | None = None) -> Iterator[None]:
        """Open the scope of the micro batch at hand.

        Args:
            length: S as the model sees it, for a model whose batch was not cut here.
            reads: whether the program reads batches for this stage; else the next sample is drawn to learn its documents.
            tokens: what the model is called with; a second model, or a second call, on the tokens of a batch shares its layout.
        """
        layout, self._pending.layout = self._pending.layout, None
        if layout is None and tokens is not None and self._pending.last is not None and self._pending.last[0]() is tokens:
            layout = self._pending.last[1]
        if layout is None and reads and self.maker.plan.size > 1 and not self.maker.plan.holds_zigzag:
            warn_once(
                "context parallelism: this batch was not cut by get_batch_on_this_cp_rank; %s expects the tokens of its own layout, "
                "see mindspeed.core.context_parallel.layout",
                self.maker.plan.algorithm,
            )
        if layout is None and length is not None:
            if self.documents is not None and not reads and self._pending.iterator is not None:
                first = self.tensor_group is None or dist.get_rank(self.tensor_group()) == 0
                self.note_documents(next(self._pending.iterator) if first else None)
                layout = self._take_layout(length)
            elif self.documents is not None and reads:
                warn_once(
                    "--reset-attention-mask: this batch was not read by get_batch_on_this_tp_rank, so its documents are not known "
                    "and attention does not stay inside them"
                )
            elif self.maker.has_mask():
                layout = self.maker.layout(length)  # recomputation must see this mask, whatever is set by then
        with layout_scope(layout):
            yield


def _length_of(batch: MutableMapping[str, Any]) -> int | None:
    """S of a batch."""
    for key in ("tokens", "labels", "position_ids", "loss_mask"):
        if isinstance(batch.get(key), Tensor):
            return int(batch[key].shape[1])
    return None


def _broadcast_lists(group: ProcessGroup, *lists: list[int] | None) -> list[list[int]]:
    """Lists of integers of a group's first rank, on all of its ranks."""
    from mindspeed.platform import current

    device, source = current().device(), dist.get_global_rank(group, 0)
    counts = torch.tensor([0 if values is None else len(values) for values in lists], dtype=torch.int64, device=device)
    dist.broadcast(counts, source, group=group)
    total = int(counts.sum())
    known = [value for values in lists for value in (values or ())]
    flat = torch.tensor(known if len(known) == total else [0] * total, dtype=torch.int64, device=device)
    dist.broadcast(flat, source, group=group)
    return [part.tolist() for part in flat.cpu().split(counts.tolist())]
