"""The last steps of a save, and what makes them safe to be interrupted: finishing or undoing them later.

A save under way counts as complete from the moment its manifest exists. `recover` therefore finishes a save
that has one and removes one that has not; both end in the same states that an undisturbed save leaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from mindspeed.checkpoint import layout
from mindspeed.checkpoint.files import fsync_directory, remove_tree, replace_durably
from mindspeed.checkpoint.manifest import NAME, differences, read_manifest
from mindspeed.checkpoint.structure import structural_problems
from mindspeed.errors import CheckpointError

logger = logging.getLogger(__name__)


def put_in_place(root: Path, staged: Path, iteration: int) -> None:
    """Rename a complete staged checkpoint to its final name, and point the tracker to it.

    Raises:
        OSError: the tracker is as it was; `take_back` restores the directories.
    """
    final, former = root / layout.iteration_name(iteration), root / layout.replaced_name(iteration)
    if final.exists():
        if former.exists():
            remove_tree(former, first=NAME)
        os.rename(final, former)
    os.rename(staged, final)
    fsync_directory(root)
    replace_durably(root / layout.TRACKER, str(iteration).encode())
    # From here on the new checkpoint is the one that loads, so nothing may make the save look failed any more.
    try:
        fsync_directory(root)
        if former.exists():
            remove_tree(former, first=NAME)
    except OSError as error:
        logger.warning(
            "iteration %d is saved in %s, but tidying up failed (the next save tries again): %s", iteration, root, error
        )


def take_back(root: Path, staged: Path, iteration: int) -> None:
    """Undo `put_in_place` after a failure: the former checkpoint of this iteration gets its name back."""
    final, former = root / layout.iteration_name(iteration), root / layout.replaced_name(iteration)
    if final.exists() and not staged.exists():
        os.rename(final, staged)
    if former.exists() and not final.exists():
        os.rename(former, final)


def is_complete(directory: Path) -> bool:
    """Whether a directory holds all files of its manifest, at their sizes."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError:
        return False
    return manifest is not None and not differences(directory, manifest, "size")


def recover(save: str | os.PathLike[str]) -> None:
    """Finish or remove what interrupted saves left in a --save directory. Only the job that holds the lock may call it."""
    root = Path(save)
    if not root.is_dir():
        return
    for iteration, staged in reversed(layout.saves_under_way(root)):
        if is_complete(staged):
            logger.warning("finishing the interrupted save of iteration %d in %s", iteration, root)
            put_in_place(root, staged, iteration)
        else:
            logger.warning("removing %s, left by an interrupted save", staged)
            remove_tree(staged, first=NAME)
    for iteration, former in layout.replaced(root):
        final = root / layout.iteration_name(iteration)
        final_is_whole = final.is_dir() and (is_complete(final) or not structural_problems(final))
        if not final_is_whole and (is_complete(former) or not structural_problems(former)):
            logger.warning("bringing back the former checkpoint of iteration %d in %s", iteration, root)
            if final.exists():
                remove_tree(final, first=NAME)
            os.rename(former, final)
        else:
            remove_tree(former, first=NAME)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(root / f".{layout.TRACKER}.tmp")
