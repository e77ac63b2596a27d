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
    def passing(self, tensor: Tensor, *, to: int, source: int, tag: int) -> Iterator[Incoming]:
        """Send `tensor` to one rank and receive its like from another while the block runs.

        The tensor must not be written to inside the block. `tag` tells transfers apart that are open at once.
        """
        tensor = tensor.contiguous()
        incoming = Incoming(torch.empty_like(tensor))
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
