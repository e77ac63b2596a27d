"""Which device computes which tile in which round: a schedule is data.

A tile (row, column) holds the queries of device `row` and the keys of device `column`. It is computed by its row's
device (which fetches the keys, or has them) or by its column's device (which borrows the queries and returns a partial
result). In a round a device computes at most one tile and spends at most `BUDGET` units on messages.
"""

from __future__ import annotations

from collections import defaultdict, deque
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
    """Rounds that compute every needed tile exactly once, each device at most one per round, within the budget.

    First tiles are shared out so that the busiest device has as few as possible, then each device works through its own:
    the local one first, which hides the first transfer, and others by distance, so that messages spread over the devices.
    """
    ranks = len(grid)
    left: list[list[Task]] = [[] for _ in range(ranks)]
    for (row, column), device in owners_of_tiles(grid).items():
        left[device].append(Task(device, row, column))
    for tasks in left:
        tasks.sort(
            key=lambda task: (task.column - task.row) % ranks if task.device == task.row else (task.row - task.column) % ranks
        )
    rounds: list[Round] = []
    spent: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    while any(left):
        rounds.append(_one_round(len(rounds), left, spent))
    return tuple(rounds)


def owners_of_tiles(grid: Sequence[Sequence[bool]]) -> dict[tuple[int, int], int]:
    """Device of each needed tile, its row's or its column's, such that the largest number of tiles on a device is least."""
    ranks = len(grid)
    owner = {(device, device): device for device in range(ranks) if grid[device][device]}
    load = [int(bool(grid[device][device])) for device in range(ranks)]
    for row in range(ranks):
        for column in range(ranks):
            if grid[row][column] and row != column:
                device = row if load[row] <= load[column] else column
                owner[row, column] = device
                load[device] += 1
    while handed_on := _relief(owner, load):
        for tile, device in handed_on:
            load[owner[tile]] -= 1
            load[device] += 1
            owner[tile] = device
    return owner


def _relief(owner: dict[tuple[int, int], int], load: Sequence[int]) -> list[tuple[tuple[int, int], int]]:
    """Tiles to hand on, each to its other device, so that one of the busiest devices loses one and an idler one gains one."""
    for busiest in (device for device, count in enumerate(load) if count == max(load)):
        came: dict[int, tuple[tuple[int, int], int] | None] = {busiest: None}
        waiting = deque([busiest])
        while waiting:
            device = waiting.popleft()
            if load[device] <= load[busiest] - 2:
                handed_on = []
                while step := came[device]:
                    handed_on.append((step[0], device))
                    device = step[1]
                return handed_on
            for (row, column), holder in owner.items():
                other = column if device == row else row
                if holder == device and other not in came:
                    came[other] = (row, column), device
                    waiting.append(other)
    return []


def _one_round(number: int, left: list[list[Task]], spent: dict[int, dict[int, int]]) -> Round:
    """The next task of every device whose messages fit, busiest devices first; removes them from `left`."""
    tasks = []
    for own in sorted(left, key=len, reverse=True):
        task = next((task for task in own if _fits(task, number, spent)), None)
        if task is not None:
            own.remove(task)
            tasks.append(task)
    return tuple(sorted(tasks, key=lambda task: task.device))


def _fits(task: Task, number: int, spent: dict[int, dict[int, int]]) -> bool:
    """Book a task's messages if they are within the budget."""
    costs = _costs(task)
    if any(spent[number + later][device] + units > BUDGET for later, device, units in costs):
        return False
    for later, device, units in costs:
        spent[number + later][device] += units
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
