"""Two random streams in one generator: the host's draws must not advance the device's stream.

On an accelerator the CPU generator (host) and the device's generator are different objects. On a CPU the default
generator is the device's stream, and the host's stream is a state that takes its place for the length of a block.
Without this, a DataLoader that exists on one tensor-parallel rank only would make dropout masks differ between ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class HostRandomStream:
    """The host's random stream; starts as a copy of the default generator's state."""

    def __init__(self) -> None:
        self._waiting = torch.default_generator.get_state()  # host's state outside blocks, the device's inside
        self._depth = 0

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """The default generator continues the host's stream inside the block; blocks may nest."""
        self._depth += 1
        if self._depth == 1:
            self._swap()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._swap()

    def _swap(self) -> None:
        active = torch.default_generator.get_state()
        torch.default_generator.set_state(self._waiting)
        self._waiting = active

    def state(self) -> torch.Tensor:
        """State of the host's stream, uint8."""
        return torch.default_generator.get_state() if self._depth else self._waiting.clone()

    def set_state(self, state: torch.Tensor) -> None:
        """Restore the host's stream."""
        if self._depth:
            torch.default_generator.set_state(state)
        else:
            self._waiting = state.clone()

    def seed(self, seed: int) -> None:
        """Seed the host's stream alone, as `torch.manual_seed` does beside the device's."""
        self.set_state(torch.Generator().manual_seed(seed).get_state())
