"""A save that is seen whole or not at all, also when it is killed, when the disk is full, or when it repeats an iteration.

    with Save(args.save, iteration, team=team, format="torch", world={"world_size": 8}) as save:
        torch.save(state, save.wrote(save.redirect(checkpoint_name)))

The files go to a hidden directory beside the checkpoints. Leaving the block makes them durable, writes the
manifest (from that moment the checkpoint counts), renames the directory into its place and lastly updates
the tracker. Whatever is interrupted is finished or removed by the next `Save` or by `recover`.

An asynchronous save uses the three steps by themselves:

    save = Save(...); save.begin()          # all ranks, then the snapshot is handed to a writer
    seal(save.staged, rank)                 # last thing the writer does, in whatever process: checksums off the step's path
    save.commit()                           # all ranks, when all writers are done; `save.abandon()` after a failure
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mindspeed.checkpoint import layout
from mindspeed.checkpoint.errors import is_write_failure, save_error
from mindspeed.checkpoint.files import files_below, fsync_directory, remove_tree, write_durably
from mindspeed.checkpoint.manifest import NAME, FileEntry, Manifest, entries_of, share, writer_of
from mindspeed.checkpoint.recovery import put_in_place, recover, take_back
from mindspeed.checkpoint.structure import structural_problems
from mindspeed.checkpoint.team import SOLO, Team
from mindspeed.errors import CheckpointError

logger = logging.getLogger(__name__)
_RECEIPT = "mindspeed_receipt"


class Save:
    """One save of one iteration; `with` it, or call `begin`, `commit` and `abandon`.

    Args:
        root: the --save directory.
        iteration: training step after which the state was taken.
        team: the ranks that save together; every method but `redirect` and `wrote` is collective.
        format: "torch" or "torch_dist", for the manifest.
        world: sizes of the job, for the manifest.
        keep_training: a file-system failure is logged instead of raised when the block ends.

    Attributes:
        staged: directory that the files go to, after `begin`.
        final: directory that they will be in.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        iteration: int,
        *,
        team: Team = SOLO,
        format: str = "torch",
        world: Mapping[str, int] | None = None,
        keep_training: bool = False,
    ) -> None:
        self.root = Path(root)
        self.iteration = iteration
        self.final = self.root / layout.iteration_name(iteration)
        self.staged = self.final
        self.failure: CheckpointError | None = None
        self._team = team
        self._format = format
        self._world = dict(world or {})
        self._keep_training = keep_training
        self._written: set[str] = set()

    def begin(self) -> None:
        """Remove what interrupted saves left, and make the directory to write to."""

        def prepare() -> str | None:
            if not self._team.leads:
                return None
            os.makedirs(self.root, exist_ok=True)
            recover(self.root)
            name = layout.saving_name(self.iteration, secrets.token_hex(4))
            os.mkdir(self.root / name)
            return name

        self.staged = self.root / str(self._guarded(prepare)[0])

    def redirect(self, path: str | os.PathLike[str]) -> str:
        """Where to write what is to become `path`: files of this iteration are staged, others stay as they are."""
        try:
            return str(self.staged / Path(path).relative_to(self.final))
        except ValueError:
            return os.fspath(path)

    def wrote(self, path: str | os.PathLike[str]) -> str:
        """Note that this rank writes the staged `path`, so that errors can name it; returns the path."""
        self._written.add(Path(path).relative_to(self.staged).as_posix())
        return os.fspath(path)

    def commit(self, *, sealed: bool = False) -> None:
        """Make the staged files the checkpoint of this iteration, and the newest one.

        Args:
            sealed: the writers were to call `seal`; one that did not has not finished.

        Raises:
            CheckpointError: on every rank; nothing of this save remains, earlier checkpoints are what they were.
        """
        try:
            declared: dict[str, int] = {}
            for rank, written in enumerate(self._team.gather(self._written)):
                declared.update((name, rank) for name in written if name not in declared)
            entries: dict[str, FileEntry] = {}
            for part in self._guarded(lambda: self._measure(declared, sealed)):
                entries.update(part)
            self._guarded(lambda: self._publish(entries) if self._team.leads else None)
        except BaseException:
            self.abandon()
            raise

    def _measure(self, declared: Mapping[str, int], sealed: bool) -> dict[str, FileEntry]:
        """Sizes and checksums of this rank's share; those of its writer process are taken over."""
        receipt = read_receipt(self.staged, self._team.rank)
        if sealed and receipt is None:
            raise CheckpointError(f"the writer of rank {self._team.rank} ended before its files in {self.staged} were complete")
        names = self._staged_files()
        if missing := sorted(set(receipt or ()) - set(names)):
            raise CheckpointError(f"{self.staged / missing[0]}, which the writer of rank {self._team.rank} made, is gone")
        mine = share(names, self._team.rank, self._team.size, declared)
        known = {name: entry for name, entry in (receipt or {}).items() if name in mine}
        return known | entries_of(self.staged, [name for name in mine if name not in known], declared=declared, durable=True)

    def _publish(self, entries: dict[str, FileEntry]) -> None:
        """The leader's part: manifest, place, tracker, in this order."""
        # On a network file system, the other ranks may have listed the directory before all names had reached them.
        entries |= entries_of(self.staged, [name for name in self._staged_files() if name not in entries], durable=True)
        if not entries:
            raise CheckpointError(f"no rank wrote a file of iteration {self.iteration} to {self.staged}")
        for receipt in self.staged.glob(f"*{_RECEIPT}*"):
            receipt.unlink()
        for folder in {str(Path(name).parent) for name in entries}:
            fsync_directory(self.staged / folder)
        manifest = Manifest(self.iteration, self._format, self._world, entries)
        write_durably(self.staged / NAME, manifest.to_bytes())
        put_in_place(self.root, self.staged, self.iteration)

    def _staged_files(self) -> list[str]:
        return [name for name in files_below(self.staged) if _RECEIPT not in name]

    def abandon(self) -> None:
        """Remove the staged files after a failure; what cannot be removed now, the next save removes."""
        if self._team.leads and self.staged != self.final:
            with contextlib.suppress(OSError):
                take_back(self.root, self.staged, self.iteration)
            with contextlib.suppress(OSError):
                remove_tree(self.staged, first=NAME)

    def _guarded(self, work: Callable[[], Any]) -> list[Any]:
        """`work` on all ranks; a file-system failure becomes one CheckpointError on each."""

        def described() -> Any:
            try:
                return work()
            except OSError as error:
                raise self._described(error) from error

        return self._team.together(described)

    def _described(self, error: BaseException) -> CheckpointError:
        outcome = f"Iteration {self.iteration} was not saved, earlier checkpoints are intact"
        return save_error(error, self.root, outcome=outcome)

    def __enter__(self) -> Save:
        try:
            self.begin()
        except CheckpointError as error:
            if not self._keep_training:
                raise
            # The body of the block runs all the same: what it writes lands where the next save removes it.
            self.staged = self.root / layout.saving_name(self.iteration, "0")
            self.failure = error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            if error is not None and not is_write_failure(error) and not self.failure:
                self._team.gather(f"{kind.__name__ if kind else ''}: {error}")  # so that the other ranks do not wait
                self.abandon()
                return False
            self._finish(error)
        except CheckpointError as failure:
            self.failure = failure
            if not self._keep_training:
                raise
            logger.warning("%s Training goes on (--ckpt-save-failure continue).", failure)
        return True

    def _finish(self, error: BaseException | None) -> None:
        """Commit when the block went well on all ranks, else clean up and raise the same error on all."""
        mine = self.failure or (None if error is None else self._described(error))
        reports = self._team.gather(None if mine is None else str(mine))
        if not any(reports):
            return self.commit()
        self.abandon()
        if mine is not None:
            raise mine from error
        rank, text = next((rank, text) for rank, text in enumerate(reports) if text)
        raise CheckpointError(f"rank {rank}: {text}")


def add_manifest(
    directory: str | os.PathLike[str],
    iteration: int,
    *,
    team: Team = SOLO,
    format: str = "torch",
    world: Mapping[str, int] | None = None,
) -> bool:
    """Give a finished checkpoint that was saved without `Save` a manifest; False if it has one. Collective.

    From now on damage to it is found; whether the save itself was whole, the structure alone could tell.

    Raises:
        CheckpointError: it is not whole, or the manifest cannot be written; on every rank.
    """
    place = Path(directory)
    if any(team.gather((place / NAME).exists())):
        return False
    entries: dict[str, FileEntry] = {}
    for part in team.together(lambda: entries_of(place, share(files_below(place), team.rank, team.size), durable=True)):
        entries.update(part)

    def publish() -> None:
        if problems := structural_problems(place):
            raise CheckpointError(f"checkpoint {place} was not saved whole: {'; '.join(problems)}")
        write_durably(place / NAME, Manifest(iteration, format, dict(world or {}), entries).to_bytes())

    team.together(lambda: publish() if team.leads else None)
    return True


def seal(staged: str | os.PathLike[str], rank: int) -> None:
    """Measure and fsync the files whose names say that `rank` wrote them, and leave a receipt for the commit.

    Meant for the writer process of an asynchronous save: it needs no other rank and no process group.
    """
    directory = Path(staged)
    names = [name for name in files_below(directory) if writer_of(name) == rank and name.endswith(".distcp")]
    entries = entries_of(directory, names, durable=True)
    content = {name: [entry.size, entry.rank, list(entry.sums)] for name, entry in entries.items()}
    write_durably(directory / f".{_RECEIPT}_{rank}", json.dumps(content).encode())


def read_receipt(staged: Path, rank: int) -> dict[str, FileEntry] | None:
    """What `seal` left; None when it did not run."""
    try:
        content = json.loads((staged / f".{_RECEIPT}_{rank}").read_bytes())
    except FileNotFoundError:
        return None
    return {name: FileEntry(size, tuple(sums), writer) for name, (size, writer, sums) in content.items()}
