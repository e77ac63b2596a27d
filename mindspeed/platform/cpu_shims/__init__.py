"""The names of torch that are retargeted on a CPU, one module per theme; each yields patches for the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mindspeed.patching.patch import Patch

if TYPE_CHECKING:
    from mindspeed.platform.cpu import Cpu


def shims(platform: Cpu) -> Iterator[Patch]:
    """All patches of platform cpu."""
    return iter(())
