"""Names inside a `--save` directory: Megatron's own, and those of a save under way, which Megatron ignores.

<save>/iter_0000100/                      a checkpoint
<save>/latest_checkpointed_iteration.txt  the tracker: "100" or "release"
<save>/.saving_0000200_<token>/           a save under way; complete once its manifest is there
<save>/.replaced_0000100/                 the former checkpoint of an iteration that is saved again
<save>/.mindspeed_lock                    which job saves here
"""

from __future__ import annotations

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
LOCK = ".mindspeed_lock"
_ITERATION = re.compile(r"iter_(\d{7,})")
_SAVING = re.compile(r"\.saving_(\d{7,})_[0-9a-f]+")
_REPLACED = re.compile(r"\.replaced_(\d{7,})")


def iteration_name(iteration: int) -> str:
    """Directory name of a checkpoint."""
    return f"iter_{iteration:07d}"


def saving_name(iteration: int, token: str) -> str:
    """Directory name of a save under way; the token keeps a writer left over from a dead job out of it."""
    return f".saving_{iteration:07d}_{token}"


def replaced_name(iteration: int) -> str:
    """Where a checkpoint waits while its successor of the same iteration takes its place."""
    return f".replaced_{iteration:07d}"


def _matching(root: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    found = ((pattern.fullmatch(child.name), child) for child in root.iterdir())
    return sorted(((int(match.group(1)), child) for match, child in found if match), reverse=True)


def iterations(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint directories, newest first."""
    return _matching(root, _ITERATION)


def saves_under_way(root: Path) -> list[tuple[int, Path]]:
    """Directories of unfinished saves, newest first."""
    return _matching(root, _SAVING)


def replaced(root: Path) -> list[tuple[int, Path]]:
    """Set-aside former checkpoints, newest first."""
    return _matching(root, _REPLACED)
