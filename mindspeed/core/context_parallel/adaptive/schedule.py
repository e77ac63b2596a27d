"""Which device computes which tile in which round: a schedule is data.

A tile (row, column) holds the queries of device `row` and the keys of device `column`. It is computed by its row's
device (which fetches the keys, or has them) or by its column's device (which borrows the queries and returns a partial
result). In a round a device computes at most one tile and spends at most `BUDGET` units on messages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

BUDGET = 6
KEYS, QUERIES, RESULT = 2, 1, 1  # units at both ends of a transfer


@dataclass(frozen=True)
class Task:
    """A tile and the device that computes it."""

    device: int
    row: int
    column: int

    @property
    def kind(self) -> str:
        """ "local", "fetch" (keys come) or "help" (queries come, the result goes back)."""
        if self.row == self.column:
            return "local"
        return "fetch" if self.device == self.row else "help"


Round = tuple[Task, ...]


def schedule_tiles(grid: Sequence[Sequence[bool]]) -> tuple[Round, ...]:
    """Rounds that compute every needed tile exactly once, each device at most one per round, within the budget."""
    ranks = len(grid)
    needed = {(row, column) for row in range(ranks) for column in range(ranks) if grid[row][column]}
    rounds: list[Round] = []
    spent: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    while needed:
        chosen = _one_round(ranks, len(rounds), needed, spent)
        rounds.append(chosen)
    return tuple(rounds)


def _one_round(ranks: int, number: int, needed: set[tuple[int, int]], spent: dict[int, dict[int, int]]) -> Round:
    """Give every device its tile of this round; removes them from `needed`."""
    tasks: dict[int, Task] = {}
    lent: set[int] = set()
    for device in range(ranks):  # the ring's own pattern first: it balances messages
        column = (device + number) % ranks
        _take(Task(device, device, column), number, needed, spent, tasks)
    for device in range(ranks):
        if device in tasks:
            continue
        for step in range(ranks):
            if _take(Task(device, device, (device - step) % ranks), number, needed, spent, tasks):
                break
        else:
            for step in range(1, ranks):
                row = (device + step) % ranks
                if row not in lent and _take(Task(device, row, device), number, needed, spent, tasks):
                    lent.add(row)
                    break
    return tuple(tasks[device] for device in sorted(tasks))


def _take(
    task: Task, number: int, needed: set[tuple[int, int]], spent: dict[int, dict[int, int]], tasks: dict[int, Task]
) -> bool:
    """Take a tile if it is needed and its messages fit."""
    if (task.row, task.column) not in needed:
        return False
    costs = _costs(task)
    if any(spent[number + later][device] + units > BUDGET for later, device, units in costs):
        return False
    for later, device, units in costs:
        spent[number + later][device] += units
    needed.remove((task.row, task.column))
    tasks[task.device] = task
    return True


def _costs(task: Task) -> list[tuple[int, int, int]]:
    """(rounds later, device, units) of a task's messages."""
    if task.kind == "local":
        return []
    if task.kind == "fetch":
        return [(0, task.device, KEYS), (0, task.column, KEYS)]
    return [(0, task.row, QUERIES), (0, task.device, QUERIES), (1, task.row, RESULT), (1, task.device, RESULT)]


def message_units(rounds: Sequence[Round]) -> dict[tuple[int, int], int]:
    """Units that each (round, device) spends, for tests and drawings."""
    units: dict[tuple[int, int], int] = defaultdict(int)
    for number, tasks in enumerate(rounds):
        for task in tasks:
            for later, device, cost in _costs(task):
                units[number + later, device] += cost
    return dict(units)
