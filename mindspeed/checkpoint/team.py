"""The ranks that save or load together, as two plain values and one callable, so that no process group is needed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mindspeed.errors import CheckpointError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Team:
    """The ranks of one job.

    Attributes:
        rank, size: of this process.
        gather: collective; takes one object of each rank and returns the list of all, in rank order, on every
            rank. With torch.distributed: `lambda item: (dist.all_gather_object(out := [None] * size, item), out)[1]`.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda item: [item]

    @property
    def leads(self) -> bool:
        """Whether this rank does what only one may do."""
        return self.rank == 0

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work` on each rank and return all results; one rank's failure raises on all of them.

        Without this, the ranks whose part went well would wait in the next collective until its time-out.

        Raises:
            CheckpointError: the text of each distinct failure, with the ranks that met it.
        """
        failure: BaseException | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:
            failure = error
        reports = self.gather((result, None if failure is None else f"{failure}"))
        texts = [text for _, text in reports]
        if any(texts):
            if failure is not None and (self.size == 1 or not isinstance(failure, CheckpointError | OSError)):
                raise failure
            raise CheckpointError(_joined(texts)) from failure
        return [result for result, _ in reports]


def _joined(texts: list[str | None]) -> str:
    """Distinct failures, each with the ranks that met it when these are not all."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks_of.setdefault(text, []).append(rank)
    if len(texts) == 1 or (len(ranks_of) == 1 and len(next(iter(ranks_of.values()))) == len(texts)):
        return next(iter(ranks_of))
    return "\n".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())


SOLO = Team()
