"""Streams and events: all work is done in program order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mindspeed.patching.patch import Patch
from mindspeed.platform.cpu_shims._places import answer, answers, everywhere, instead, method
from mindspeed.platform.scope import mark
from mindspeed.platform.streams import ProgramOrderEvent, ProgramOrderStream, on_stream

_REASON = "work on a CPU is done in program order"


def patches() -> Iterator[Patch]:
    """Classes, current streams, and `Tensor.record_stream`."""
    modules = ("torch.cuda", "torch.cuda.streams")
    for name, ours in (("Stream", ProgramOrderStream), ("ExternalStream", ProgramOrderStream), ("Event", ProgramOrderEvent)):
        yield from everywhere(name, instead(ours), *modules, reason=_REASON, unrelated=True)
    current = answer(ProgramOrderStream())
    table = {"stream": on_stream, "current_stream": current, "default_stream": current, "set_stream": answer(None)}
    yield from answers(table | {"get_stream_from_external": current}, "torch.cuda", reason=_REASON)
    yield method(torch.Tensor, "torch:Tensor.record_stream", _recorded_unless_ours, reason=_REASON)


def _recorded_unless_ours(original: Any) -> Any:
    def record_stream(self: torch.Tensor, stream: Any) -> None:
        """Nothing to remember: memory is never reused before its last reader is done."""
        if not isinstance(stream, ProgramOrderStream):
            original(self, stream)

    return mark(record_stream, original)
