"""Messages between the ranks of a ring: started before the work that hides them, waited for after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Incoming:
    """A message under way; `tensor` is valid once the block of `Exchange.passing` is left."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Exchange:
    """Point-to-point transfers inside one process group, addressed by ranks of the group."""

    def __init__(self, group: ProcessGroup, second: ProcessGroup | None = None, addresses: ProcessGroup | None = None) -> None:
        """Take the groups.

        Args:
            group: whose communicator carries the messages.
            second: the same ranks with a communicator of their own. Messages of even senders travel on `group`, of odd
                ones on `second`, so that a device sends and receives at the same time.
            addresses: the group whose ranks `to` and `source` are; `group` itself by default.
        """
        self._groups = (group, second or group)
        self._addresses = addresses or group
        self._rank = dist.get_rank(self._addresses)
        self._tagged = dist.get_backend(group) == "gloo"

    @contextmanager
    def passing(self, tensor: Tensor, *, to: int, source: int, tag: int, room: Tensor | None = None) -> Iterator[Incoming]:
        """Send `tensor` to one rank and receive its like from another while the block runs.

        The tensor must not be written to inside the block. `tag` tells transfers apart that are open at once. `room` is
        memory that nobody uses any more, for what is received.
        """
        tensor = tensor.contiguous()
        incoming = Incoming(torch.empty_like(tensor) if room is None else room)
        pending = self._start(tensor, incoming.tensor, to, source, tag)
        try:
            yield incoming
        finally:
            for work in pending:
                work.wait()

    def _start(self, outgoing: Tensor, received: Tensor, to: int, source: int, tag: int) -> list[dist.Work]:
        target, origin = dist.get_global_rank(self._addresses, to), dist.get_global_rank(self._addresses, source)
        sending, receiving = self._groups[self._rank % 2], self._groups[source % 2]
        if self._tagged:
            receive = dist.irecv(received, origin, group=receiving, tag=tag)
            send = dist.isend(outgoing, target, group=sending, tag=tag)
            return [work for work in (send, receive) if work is not None]
        operations = [
            dist.P2POp(dist.isend, outgoing, target, group=sending),
            dist.P2POp(dist.irecv, received, origin, group=receiving),
        ]
        if sending is receiving:  # unbatched, a ring on one communicator would wait for itself
            return list(dist.batch_isend_irecv(operations))
        return [work for operation in operations for work in dist.batch_isend_irecv([operation])]


class Packed:
    """Several tensors as one flat message."""

    def __init__(self, shapes: list[torch.Size], flat: Tensor) -> None:
        self.shapes = shapes
        self.flat = flat

    @classmethod
    def of(cls, *parts: Tensor, dtype: torch.dtype | None = None) -> Packed:
        """Copy the parts into a message of the first one's dtype, or another."""
        size = sum(part.numel() for part in parts)
        packed = cls([part.shape for part in parts], parts[0].new_empty(size, dtype=dtype))
        for room, part in zip(packed.split(packed.flat), parts, strict=True):
            room.copy_(part)
        return packed

    def split(self, flat: Tensor) -> list[Tensor]:
        """Tensors of a message of this form, as views."""
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


class Mailbox:
    """Any pattern of messages inside a group, started batch by batch."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.tagged = dist.get_backend(group) == "gloo"

    def batch(self) -> Batch:
        """An empty batch."""
        return Batch(self)


class Batch:
    """Messages that are started together."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._sends: list[tuple[Tensor, int, int]] = []
        self._receives: list[tuple[Tensor, int, int]] = []

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        """Add a message to a rank of the group; the tensor is not written to until it is delivered."""
        self._sends.append((tensor, to, tag))

    def receive(self, buffer: Tensor, source: int, tag: int) -> None:
        """Add a message from a rank of the group."""
        self._receives.append((buffer, source, tag))

    def start(self) -> Pending:
        """Start all messages; without tags, both sides list them in the order of their tags."""
        group = self._mailbox.group
        sends = [(t, dist.get_global_rank(group, rank), tag) for t, rank, tag in self._sends]
        receives = [(t, dist.get_global_rank(group, rank), tag) for t, rank, tag in self._receives]
        buffers = [buffer for buffer, _, _ in self._receives]
        if self._mailbox.tagged:
            works = [dist.irecv(buffer, rank, group=group, tag=tag) for buffer, rank, tag in receives]
            works += [dist.isend(tensor, rank, group=group, tag=tag) for tensor, rank, tag in sends]
            return Pending([work for work in works if work is not None], buffers)
        operations = [(tag, dist.P2POp(dist.irecv, buffer, rank, group=group)) for buffer, rank, tag in receives]
        operations += [(tag, dist.P2POp(dist.isend, tensor, rank, group=group)) for tensor, rank, tag in sends]
        ordered = [operation for _, operation in sorted(operations, key=lambda pair: pair[0])]
        return Pending(list(dist.batch_isend_irecv(ordered)) if ordered else [], buffers)


class Pending:
    """Messages under way."""

    def __init__(self, works: list[dist.Work], buffers: list[Tensor]) -> None:
        self._works = works
        self._buffers = buffers

    def wait(self) -> list[Tensor]:
        """Finish; the received tensors in the order in which they were asked for."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._buffers
