"""Clocks, repetition counts and statistics."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks._case import Floor, Staged

MIN_SECONDS = 0.1  # shortest measured stretch of one contender in one round
MAX_CALLS = 2000
FLUSH_BYTES = 256 << 20  # more than the last-level cache of any GPU
NOISY_SPREAD = 0.15


@dataclass(frozen=True)
class Summary:
    """Middle and width of a few repeated figures."""

    median: float
    p20: float
    p80: float

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / abs(self.median) if self.median else 0.0


def summarise(values: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(np.asarray(values, dtype=np.float64), (20, 50, 80))
    return Summary(float(median), float(p20), float(p80))


def seconds_per_call(contender: Callable[..., Any] | Staged, inputs: tuple[Any, ...], clock: str, calls: int) -> float:
    """Cost of one call, averaged over `calls`; a staged contender's preparation is not counted."""
    timed = _timed_on_device if clock == "device" else _timed_on_host
    with _without_collector():
        return timed(contender, inputs, clock, calls) / calls


def _timed_on_host(contender: Any, inputs: tuple[Any, ...], clock: str, calls: int) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    call, prepare, reusable = _parts(contender)
    if reusable:
        prepared = prepare(*inputs)
        start = now()
        for _ in range(calls):
            call(*prepared)
        return now() - start
    total = 0.0
    for _ in range(calls):
        prepared = prepare(*inputs)
        start = now()
        call(*prepared)
        total += now() - start
    return total


def _timed_on_device(contender: Any, inputs: tuple[Any, ...], clock: str, calls: int) -> float:
    """Sum of event times, the cache flushed before each call."""
    call, prepare, _ = _parts(contender)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, end in pairs:
        prepared = prepare(*inputs)
        flush.zero_()
        start.record()
        call(*prepared)
        end.record()
    torch.cuda.synchronize()
    return float(np.median([start.elapsed_time(end) for start, end in pairs])) * calls / 1e3


def _parts(contender: Any) -> tuple[Callable[..., Any], Callable[..., tuple[Any, ...]], bool]:
    if isinstance(contender, Staged):
        return contender.call, contender.prepare, bool(getattr(contender, "reusable", False))
    return contender, lambda *inputs: inputs, True


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def calls_needed(seconds: float, minimum: float = MIN_SECONDS) -> int:
    """How many calls of that cost fill the shortest measured stretch."""
    return max(1, min(MAX_CALLS, math.ceil(minimum / max(seconds, 1e-9))))


class FloorClock:
    """Least time for a piece of work on this machine: its bytes copied, or its operations as one square matmul.

    The copy moves as many bytes as the work does, since a CPU's caches make a small copy faster than a large one.
    """

    def __init__(self, floor: Floor, device: str, clock: str) -> None:
        self._clock = clock
        self._copies: tuple[torch.Tensor, torch.Tensor] | None = None
        self._matmul_seconds = 0.0
        if floor.bytes:
            half = max(1, floor.bytes // 2)
            source = torch.randint(0, 100, (half,), dtype=torch.int8, device=device)
            self._copies = source, torch.empty_like(source)
            self._calls = calls_needed(self._copy_seconds(1))
        if floor.flops:
            self._matmul_seconds = floor.flops / matmul_rate(floor.dtype, device, clock)

    def seconds(self) -> float:
        """Measure now."""
        copying = self._copy_seconds(self._calls) if self._copies else 0.0
        return max(copying, self._matmul_seconds)

    def _copy_seconds(self, calls: int) -> float:
        return seconds_per_call(lambda source, target: target.copy_(source), self._copies or (), self._clock, calls)


def matmul_rate(dtype: torch.dtype, device: str, clock: str) -> float:
    """Operations a second of a square matmul of random data."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds_per_call(torch.mm, (a, b), clock, 1)
    return 2 * size**3 / min(seconds_per_call(torch.mm, (a, b), clock, 2) for _ in range(3))
