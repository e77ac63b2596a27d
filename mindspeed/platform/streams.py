"""Streams and events of a device without queues: work is done when the call returns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from mindspeed.errors import PlatformError


class ProgramOrderStream:
    """The one stream of a CPU process; every construction gives the same object, so comparisons hold."""

    _only: ProgramOrderStream | None = None
    device_index = 0
    stream_id = 0
    cuda_stream = 0
    priority = 0

    def __new__(cls, *_args: Any, **_options: Any) -> ProgramOrderStream:
        """Whatever is asked for, the answer is the one stream."""
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: ProgramOrderEvent | None = None) -> ProgramOrderEvent:
        """Mark this moment."""
        event = event or ProgramOrderEvent(enable_timing=True)
        event.record(self)
        return event

    def query(self) -> bool:
        """All work is done."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    @classmethod
    def priority_range(cls) -> tuple[int, int]:
        """Least and greatest priority."""
        return 0, 0

    def __enter__(self) -> ProgramOrderStream:
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ProgramOrderStream, ()

    def __repr__(self) -> str:
        return "<stream of platform cpu: program order>"


class ProgramOrderEvent:
    """A marker of wall-clock time on the program-order stream."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_options: Any
    ) -> None:
        if interprocess:
            raise PlatformError("an interprocess event needs a CUDA device (platform cpu); use interprocess=False")
        self.enable_timing = enable_timing
        self.seconds: float | None = None

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def record(self, stream: Any = None) -> None:
        """Mark this moment."""
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work before the event is done."""
        return True

    def elapsed_time(self, end_event: ProgramOrderEvent) -> float:
        """Milliseconds from this event to `end_event`.

        Raises:
            ValueError: one of the two was made without enable_timing=True (as on a device).
            RuntimeError: one of the two was not recorded.
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("both events must be created with enable_timing=True to be timed")
        if self.seconds is None or end_event.seconds is None:
            raise RuntimeError("both events must be recorded before the time between them is asked for")
        return 1e3 * (end_event.seconds - self.seconds)


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[Any]:
    """A block that runs in program order; `stream` may be None, as for torch.cuda.stream."""
    yield stream
