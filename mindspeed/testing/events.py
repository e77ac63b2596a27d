"""Order of communication and computation, so that overlap is asserted as order and never as time.

with EventLog().watching(compute=("aten::mm",)) as log:
    step()
assert log.exposed() == []                   # every transfer has computation between its issue and its wait
assert log.hidden_by("all_reduce 0") == ["aten::mm", "aten::mm"]
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup, Work
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed.testing.communication import COLLECTIVE_METHODS

KINDS = ("issue", "wait", "compute", "copy")


@dataclass(frozen=True)
class Event:
    """One event of this rank; `time` is its place in the order."""

    time: int
    kind: str
    name: str


class EventLog:
    """Ordered list of events; features under test may add their own with `record`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._seen: Counter[str] = Counter()

    def record(self, kind: str, name: str) -> None:
        """Append an event of kind issue, wait, compute or copy."""
        if kind not in KINDS:
            raise ValueError(f"event kind {kind!r} is none of {', '.join(KINDS)}")
        self.events.append(Event(len(self.events), kind, name))

    def numbered(self, name: str) -> str:
        """`name 0`, `name 1`, ... for repeated transfers."""
        self._seen[name] += 1
        return f"{name} {self._seen[name] - 1}"

    def time(self, kind: str, name: str) -> int:
        """Place of the first event of that kind and name.

        Raises:
            LookupError: there is none; the text shows the whole log.
        """
        for event in self.events:
            if (event.kind, event.name) == (kind, name):
                return event.time
        raise LookupError(f"no {kind} of {name!r} in:\n{self}")

    def transfers(self) -> list[str]:
        """Names of all transfers, in order of issue."""
        return [event.name for event in self.events if event.kind == "issue"]

    def hidden_by(self, name: str) -> list[str]:
        """Names of the computations between a transfer's issue and its wait (or the end, if nobody waited)."""
        start = self.time("issue", name)
        waits = [event.time for event in self.events if (event.kind, event.name) == ("wait", name)]
        end = waits[0] if waits else len(self.events)
        return [event.name for event in self.events[start:end] if event.kind == "compute"]

    def exposed(self) -> list[str]:
        """Transfers that no computation hides."""
        return [name for name in self.transfers() if not self.hidden_by(name)]

    def unwaited(self) -> list[str]:
        """Transfers that were issued and never waited for."""
        waited = {event.name for event in self.events if event.kind == "wait"}
        return [name for name in self.transfers() if name not in waited]

    def __str__(self) -> str:
        return "\n".join(f"{event.time:4d} {event.kind:8s}{event.name}" for event in self.events)

    @contextlib.contextmanager
    def watching(
        self,
        *,
        compute: Sequence[str] = ("aten::mm", "aten::bmm", "aten::addmm"),
        copy: Sequence[str] = (),
        name_of: Callable[[ProcessGroup, str], str] | None = None,
    ) -> Iterator[EventLog]:
        """Record communication of this process (any thread), and the named operators of this thread, inside the block.

        Args:
            compute, copy: operators whose calls become events of that kind.
            name_of: name of a transfer, given group and kind of call; a running number is appended. By default the kind
                alone. A synchronous call is an issue followed by its wait.
        """
        kinds = dict.fromkeys(compute, "compute") | dict.fromkeys(copy, "copy")
        with _watched_works(self, name_of or (lambda group, kind: kind)), _OperatorWatch(self, kinds):
            yield self


class _OperatorWatch(TorchDispatchMode):
    def __init__(self, log: EventLog, kinds: dict[str, str]) -> None:
        super().__init__()
        self._log = log
        self._kinds = kinds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kind := self._kinds.get(func._schema.name):
            self._log.record(kind, func._schema.name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched_works(log: EventLog, name_of: Callable[[ProcessGroup, str], str]) -> Iterator[None]:
    """Record calls of `ProcessGroup`'s methods as issues and `Work.wait` as waits."""
    methods = {name: ProcessGroup.__dict__[name] for name in COLLECTIVE_METHODS if name in ProcessGroup.__dict__}
    original_wait = Work.__dict__["wait"]
    pending: dict[int, tuple[Any, str]] = {}  # the work is kept so that its id stays its own

    def watch(method: str) -> Callable[..., Any]:
        call = getattr(ProcessGroup, method)

        def issue(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            name = log.numbered(name_of(group, COLLECTIVE_METHODS[method][0]))
            log.record("issue", name)
            work = call(group, *args, **kwargs)
            pending[id(work)] = work, name
            return work

        return issue

    wait_here = Work.wait

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        _, name = pending.pop(id(work), (None, ""))
        if name:
            log.record("wait", name)
        return wait_here(work, *args, **kwargs)

    for name in methods:
        setattr(ProcessGroup, name, watch(name))
    Work.wait = wait
    try:
        yield
    finally:
        Work.wait = original_wait
        for name, original in methods.items():
            setattr(ProcessGroup, name, original)
