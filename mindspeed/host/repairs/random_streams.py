"""One generator serves host and device on a CPU, so the host's check that nobody drew from the former is a false alarm."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform import Platform

HOST = "megatron.core.tensor_parallel.random"
_ALARM = "CPU RNG state changed within GPU RNG context"


def _other_than_the_alarm(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_ALARM)


@contextlib.contextmanager
def fork_without_alarm(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Draw from a named stream; leaving it, the host would warn several times in every step."""
    log = logging.getLogger(HOST)
    log.addFilter(_other_than_the_alarm)
    try:
        with original(*args, **kwargs):
            yield
    finally:
        log.removeFilter(_other_than_the_alarm)


def patches(platform: Platform) -> Iterator[Patch]:
    """The repair, where there is one generator."""
    if platform.name == "cpu":
        reason = "host and device draw from one generator, which the host takes for a mistake"
        yield wrap(f"{HOST}:CudaRNGStatesTracker.fork", fork_without_alarm, reason=reason)
