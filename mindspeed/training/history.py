"""Points of the loss curve, kept in a small file beside the checkpoints so that a resumed run continues the curve."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One logged value: `kind` is "train", "validation" or "test"; `learning_rate` belongs to training."""

    iteration: int
    kind: str
    loss: float
    learning_rate: float | None = None


class History:
    """Points of a run in order.

    Args:
        path: file with one JSON object per line; None keeps the points in memory only.
        start: iteration that the run resumes from; later points of an earlier attempt are dropped.
    """

    def __init__(self, path: Path | None = None, start: int = 0) -> None:
        self._path = path
        self.points = [point for point in _read(path) if point.iteration <= start] if start else []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(_line(point) for point in self.points), encoding="utf-8")

    def add(self, iteration: int, kind: str, loss: float | None, learning_rate: float | None = None) -> None:
        """Append a point; a step without a loss (all skipped) leaves none."""
        if loss is None:
            return
        point = Point(iteration, kind, loss, learning_rate)
        self.points.append(point)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(point))

    def of(self, kind: str) -> list[Point]:
        """Points of one kind."""
        return [point for point in self.points if point.kind == kind]


def _line(point: Point) -> str:
    return json.dumps(asdict(point)) + "\n"


def _read(path: Path | None) -> list[Point]:
    if path is None or not path.is_file():
        return []
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            points.append(Point(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # the last line of a killed run may be cut off
    return points
