"""The names of torch that are retargeted on a CPU, one module per theme; each yields patches for the ledger."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from mindspeed.errors import PlatformError
from mindspeed.patching.patch import Patch
from mindspeed.platform.cpu_shims import autocast, cuda_names, devices, distributed, memory, random, streams
from mindspeed.platform.scope import decided_by_torch, decided_outside_the_host

if TYPE_CHECKING:
    from mindspeed.platform.cpu import Cpu


def shims(platform: Cpu) -> Iterator[Patch]:
    """All patches of platform cpu, owned by it."""
    for patch in _all(platform):
        yield dataclasses.replace(patch, owner="platform.cpu")


def _who_keeps_torchs_own() -> Callable[[FrameType], bool]:
    """Whose devices are taken literally: torch's own code, and with MINDSPEED_SHIM=host-only the user's code as well."""
    told = os.environ.get("MINDSPEED_SHIM", "all")
    if told not in ("all", "host-only"):
        raise PlatformError(f"MINDSPEED_SHIM={told}: must be all or host-only. Unset it to retarget the user's code too.")
    return decided_by_torch if told == "all" else decided_outside_the_host


def _all(platform: Cpu) -> Iterator[Patch]:
    yield from cuda_names.patches()
    yield from streams.patches()
    yield from random.patches(platform.host_stream)
    yield from memory.patches(platform.memory)
    left_alone = _who_keeps_torchs_own()
    yield from devices.patches(left_alone)
    yield from autocast.patches(left_alone)
    yield from distributed.patches()
