"""Which checkpoint a run starts from: the one the tracker names if it is whole, else the newest whole one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindspeed.checkpoint import layout
from mindspeed.checkpoint.manifest import Manifest, differences, read_manifest, verify
from mindspeed.checkpoint.recovery import is_complete
from mindspeed.checkpoint.structure import structural_problems
from mindspeed.checkpoint.team import SOLO, Team
from mindspeed.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint that was checked.

    Attributes:
        directory: where its files are; usually <load>/iter_%07d.
        iteration: its training step, 0 for a release checkpoint.
        release: converted weights without a training state ("release" in the tracker).
        manifest: None for a plain Megatron checkpoint and with `verify="off"`.
        warning: why this is not what the tracker names; empty when it is.
    """

    directory: Path
    iteration: int
    release: bool = False
    manifest: Manifest | None = None
    warning: str = ""


def find_checkpoint(
    load: str | os.PathLike[str] | None,
    *,
    save: str | os.PathLike[str] | None = None,
    step: int | None = None,
    mode: str = "full",
    team: Team = SOLO,
) -> Found | None:
    """The checkpoint to load, verified; None when there is none and none is expected. Collective.

    Args:
        load, save: --load and --save. Where both are the same directory, its absence means the first run.
        step: --ckpt-step; no other one will do.
        mode: --ckpt-verify.
        team: every rank reads its share of the files.

    Raises:
        CheckpointError: the directory or every checkpoint in it is missing, or the one to load is damaged
            (its files differ from its manifest: an older one is never taken silently for that).
    """
    if load is None:
        return None
    root = Path(load)
    found = team.together(lambda: _choose(root, save, step, mode) if team.leads else None)[0]
    if found is None:
        return None
    if found.warning and team.leads:
        logger.warning("%s", found.warning)
    manifests = team.together(lambda: _verified(root, found, mode, team))
    return Found(found.directory, found.iteration, found.release, manifests[0], found.warning)


def _verified(root: Path, found: Found, mode: str, team: Team) -> Manifest | None:
    try:
        return verify(found.directory, mode, rank=team.rank, size=team.size)
    except CheckpointError as error:
        other = next((iteration for iteration, directory in layout.iterations(root) if _better(directory, found)), None)
        remedy = "restore the files from a copy"
        if other is not None:
            remedy += f", or go back to iteration {other} (--ckpt-step {other})"
        raise CheckpointError(f"{error}\nRemedy: {remedy}.") from error


def _better(directory: Path, found: Found) -> bool:
    return directory != found.directory and _reason_against(directory) == ""


def _choose(root: Path, save: str | os.PathLike[str] | None, step: int | None, mode: str) -> Found | None:
    """Tracker first, then the others from the newest; reads names and sizes only."""
    first_run = save is not None and os.path.realpath(root) == os.path.realpath(save)
    if not root.is_dir():
        if first_run and not root.exists():
            return None
        state = "is not a directory" if root.exists() else "does not exist"
        raise CheckpointError(f"--load {root}: {state}. {_expected(save)}")
    if step is not None:
        return _at_step(root, step)
    tracked, complaint = read_tracker(root)
    if tracked == "release":
        return Found(root / "release", 0, release=True)
    if isinstance(tracked, int):
        candidate = _directory_of(root, tracked)
        complaint = _reason_against(candidate) if mode != "off" or not candidate.is_dir() else ""
        # A manifest with other files beside it is damage, which `verify` reports in full, not an interrupted save.
        if not complaint or _has_manifest(candidate):
            return Found(candidate, tracked)
        complaint = f"{layout.TRACKER} names iteration {tracked}, but {complaint}"
    return _newest_whole(root, complaint, first_run, save)


def _newest_whole(root: Path, complaint: str, first_run: bool, save: str | os.PathLike[str] | None) -> Found | None:
    tried = []
    for iteration, directory in _candidates(root):
        reason = _reason_against(directory)
        if not reason:
            return Found(
                directory, iteration, warning=f"{root}: {complaint}; loading iteration {iteration}, the newest whole one"
            )
        tried.append(reason)
    if not tried and first_run and complaint == _NO_TRACKER:
        return None
    details = "".join(f"\n  {reason}" for reason in tried)
    raise CheckpointError(f"--load {root}: {complaint}, and it holds no whole checkpoint. {_expected(save)}{details}")


def _candidates(root: Path) -> Iterator[tuple[int, Path]]:
    """Checkpoints from the newest; one that a killed save had completed but not renamed stands for its iteration."""
    finished = {iteration: path for iteration, path in layout.saves_under_way(root) if is_complete(path)}
    named = dict(layout.iterations(root))
    for iteration in sorted({*finished, *named}, reverse=True):
        if iteration in named:
            yield iteration, named[iteration]
        else:
            yield iteration, finished[iteration]


def _directory_of(root: Path, iteration: int) -> Path:
    """Directory of an iteration, also while its new version is between its two names."""
    directory = root / layout.iteration_name(iteration)
    return directory if directory.exists() else dict(_candidates(root)).get(iteration, directory)


def _at_step(root: Path, step: int) -> Found:
    directory = _directory_of(root, step)
    reason = "" if directory.is_dir() else _reason_against(directory)
    if reason:
        there = ", ".join(str(iteration) for iteration, _ in layout.iterations(root)) or "none"
        raise CheckpointError(f"--ckpt-step {step}: {reason} in {root}. There are: {there}.")
    return Found(directory, step)


_NO_TRACKER = f"{layout.TRACKER} is missing"


def read_tracker(root: Path) -> tuple[int | str | None, str]:
    """(iteration or "release", "") or (None, what is wrong with the tracker)."""
    path = root / layout.TRACKER
    try:
        text = path.read_bytes().decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None, _NO_TRACKER
    except OSError as error:
        return None, f"{layout.TRACKER} cannot be read ({error.strerror}, errno {error.errno})"
    if text == "release":
        return text, ""
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text), ""
    return None, f"{layout.TRACKER} is empty" if not text else f"{layout.TRACKER} holds {text[:40]!r} instead of an iteration"


def _has_manifest(directory: Path) -> bool:
    try:
        return read_manifest(directory) is not None
    except CheckpointError:
        return True


def _reason_against(directory: Path) -> str:
    """Why a checkpoint is not whole, by names and sizes; empty when it is."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return str(error)
    problems = structural_problems(directory) if manifest is None else differences(directory, manifest, "size")
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more if not directory.exists() else f"{directory.name}: {problems[0]}{more}"


def _expected(save: str | os.PathLike[str] | None) -> str:
    return f"To start from scratch, leave --load away, or give it the same directory as --save ({save or 'not given'})."
