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

    def __init__(self, group: ProcessGroup, send_group: ProcessGroup | None = None) -> None:
        """Use `send_group` (same ranks) for sends, so that a device may send and receive at the same time."""
        self.group = group
        self.send_group = send_group or group
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
        target, origin = dist.get_global_rank(self.send_group, to), dist.get_global_rank(self.group, source)
        if self._tagged:
            receive = dist.irecv(received, origin, group=self.group, tag=tag)
            send = dist.isend(outgoing, target, group=self.send_group, tag=tag)
            return [work for work in (send, receive) if work is not None]
        operations = [
            dist.P2POp(dist.isend, outgoing, target, group=self.send_group),
            dist.P2POp(dist.irecv, received, origin, group=self.group),
        ]
        if self.send_group is not self.group:
            return [work for operation in operations for work in dist.batch_isend_irecv([operation])]
        return list(dist.batch_isend_irecv(operations))
