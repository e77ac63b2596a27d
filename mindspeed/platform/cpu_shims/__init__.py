"""The names of torch that are retargeted on a CPU, one module per theme; each yields patches for the ledger."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mindspeed.patching.patch import Patch
from mindspeed.platform.cpu_shims import autocast, cuda_names, devices, distributed, memory, random, streams

if TYPE_CHECKING:
    from mindspeed.platform.cpu import Cpu


def shims(platform: Cpu) -> Iterator[Patch]:
    """All patches of platform cpu, owned by it."""
    for patch in _all(platform):
        yield dataclasses.replace(patch, owner="platform.cpu")


def _all(platform: Cpu) -> Iterator[Patch]:
    yield from cuda_names.patches()
    yield from streams.patches()
    yield from random.patches(platform.host_stream)
    yield from memory.patches(platform.memory)
    yield from devices.patches()
    yield from autocast.patches()
    yield from distributed.patches()
