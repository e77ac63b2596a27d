"""The device this process trains on: `current()` is asked by features, kernels and hosts instead of `torch.cuda`.

The choice is made at the first question, by the environment variable MINDSPEED_PLATFORM (npu, cuda, cpu or auto),
and stays for the life of the process. Importing this package has no effect.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from mindspeed.errors import PlatformError
from mindspeed.platform.base import CAPABILITIES, MemoryStats, Platform
from mindspeed.platform.cpu import Cpu
from mindspeed.platform.cuda import Cuda
from mindspeed.platform.npu import Npu
from mindspeed.platform.refusals import refused_on_cpu

__all__ = ["CAPABILITIES", "MemoryStats", "Platform", "current", "host_rng", "named", "refused_on_cpu", "use_platform"]

logger = logging.getLogger(__name__)

VARIABLE = "MINDSPEED_PLATFORM"


class _Chosen:
    """Holds the one choice of this process."""

    platform: Platform | None = None


_chosen = _Chosen()


def current() -> Platform:
    """The platform of this process.

    Raises:
        PlatformError: MINDSPEED_PLATFORM names no platform, or one whose device or package is missing.
    """
    if _chosen.platform is None:
        _chosen.platform = named(os.environ.get(VARIABLE, "auto"))
    return _chosen.platform


def named(name: str) -> Platform:
    """The platform that a value of MINDSPEED_PLATFORM stands for; `auto` takes the first that is there.

    Raises:
        PlatformError: no such name, or the platform's device or package is missing.
    """
    known: dict[str, Platform] = {platform.name: platform for platform in (Npu(), Cuda(), Cpu())}
    if name == "auto":
        return _first_available(known.values())
    if name not in known:
        raise PlatformError(f"{VARIABLE}={name}: must be one of {', '.join(known)}, auto. Unset it to let mindspeed choose.")
    platform = known[name]
    if name == "cpu":
        Cpu.hide_gpus()
    if reason := platform.why_absent():
        raise PlatformError(f"{VARIABLE}={name}: {reason}")
    return platform


def _first_available(candidates: Iterable[Platform]) -> Platform:
    """The first platform that is there; one that is installed but does not work is passed over aloud."""
    for platform in candidates:
        reason = platform.why_absent()
        if not reason:
            return platform
        if platform.is_installed():
            logger.warning("platform %s is passed over: %s", platform.name, reason)
    raise PlatformError(f"{VARIABLE}=auto: no platform can be used; set {VARIABLE} to see the reason for one")


@contextlib.contextmanager
def use_platform(name: str | Platform) -> Iterator[Platform]:
    """Answer `current()` with another platform inside a `with` block; for tests, nothing is activated."""
    before = _chosen.platform
    _chosen.platform = name if isinstance(name, Platform) else named(name)
    try:
        yield _chosen.platform
    finally:
        _chosen.platform = before


def host_rng() -> AbstractContextManager[None]:
    """Draw from the host's random stream inside a `with` block, so that the device's stream does not advance."""
    return current().host_rng()
