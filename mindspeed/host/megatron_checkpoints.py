"""Megatron-LM's saves become whole or invisible, and its loads verified, with its own code writing and reading.

While the host saves, the names it computes are redirected into a staged directory and its tracker write goes
nowhere; `mindspeed.checkpoint` then publishes the directory and the tracker together. While it loads, the
checkpoint is chosen and verified first, and the host reads exactly that one.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mindspeed.checkpoint import Found, Save, SaveLock, Team, check_fits, find_checkpoint, recover, seal
from mindspeed.core.checkpoint.verified_checkpoints import team_of
from mindspeed.errors import CheckpointError
from mindspeed.patching.patch import Patch, wrap

if TYPE_CHECKING:
    from mindspeed.host.megatron import MegatronHost

logger = logging.getLogger(__name__)

_CHECKPOINTING = "megatron.training.checkpointing"
_SIZES = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_ONE_RANK_OF_SEVERAL = ("pipeline_rank", "expert_rank", "tensor_rank")


class CheckpointGuard:
    """Stands between the host's checkpoint functions and the file system."""

    def __init__(self, host: MegatronHost) -> None:
        self._host = host
        self._saving: Save | None = None
        self._loading: tuple[Path, Found] | None = None
        self._lock: tuple[str, SaveLock] | None = None

    def patches(self) -> Iterator[Patch]:
        """The host's functions that name, write and read checkpoints; targets may be logical."""
        why = "a save is seen whole or not at all; a load is verified"
        yield wrap("training:setup_model_and_optimizer", self._set_up, reason="one job at a time writes to --save")
        yield wrap("training:save_checkpoint", self._save, reason=why)
        yield wrap(f"{_CHECKPOINTING}:get_checkpoint_name", self._name, reason=why)
        yield wrap(f"{_CHECKPOINTING}:get_checkpoint_tracker_filename", self._tracker_name, reason=why)
        yield wrap("megatron.training.async_utils:schedule_async_save", self._schedule, reason=why)
        yield wrap("training:_load_base_checkpoint", self._load, reason=why)
        yield wrap(f"{_CHECKPOINTING}:read_metadata", self._read_tracker, reason=why)
        yield wrap(
            "training:check_checkpoint_args",
            self._compare,
            reason="a checkpoint of another model is refused with all differences",
        )

    def _compare(self, original: Callable[..., Any], saved: Any) -> Any:
        """Features say first what the saved numbers mean."""
        self._host.events.fire("checkpoint_args", saved=saved)
        run = vars(self._host.args)
        check_fits(vars(saved), run, format=getattr(saved, "ckpt_format", None) or run.get("ckpt_format") or "torch_dist")
        return original(saved)

    # --- saving ---

    def _set_up(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lock the --save directory and clear what an interrupted save left, before anything is loaded."""
        directory = self._host.args.save
        if directory and (self._lock is None or self._lock[0] != directory):
            team = team_of(self._host)
            lock = SaveLock(directory, team=team)
            lock.acquire()
            self._lock = (directory, lock)
            team.together(lambda: recover(directory) if team.leads else None)
        return original(*args, **kwargs)

    def _save(self, original: Callable[..., Any], iteration: int, *args: Any, **kwargs: Any) -> Any:
        host_args = self._host.args
        if kwargs.get("non_persistent_ckpt") or any(kwargs.get(name) is not None for name in _ONE_RANK_OF_SEVERAL):
            return original(iteration, *args, **kwargs)  # short-lived by design, or a converter that saves rank by rank
        if host_args.async_save:
            return self._begin_async(original, iteration, *args, **kwargs)
        with self._new_save(iteration) as save:
            result = self._into(save, original, iteration, *args, **kwargs)
        if save.failure is None:
            self._saved(save)
            return result
        return None

    def _new_save(self, iteration: int) -> Save:
        args = vars(self._host.args)
        return Save(
            args["save"],
            iteration,
            team=team_of(self._host),
            format=args["ckpt_format"],
            world={name: int(args[name]) for name in _SIZES if args.get(name)},
            keep_training=args.get("ckpt_save_failure") == "continue",
        )

    def _into(self, save: Save, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._saving = save
        try:
            return original(*args, **kwargs)
        finally:
            self._saving = None

    def _begin_async(self, original: Callable[..., Any], iteration: int, *args: Any, **kwargs: Any) -> Any:
        """Stage now, publish when the host finalises; a save still under way is finished first."""
        self._host.load("megatron.training.async_utils:maybe_finalize_async_save")(blocking=True)
        save = self._new_save(iteration)
        save.begin()
        try:
            return self._into(save, original, iteration, *args, **kwargs)
        except BaseException:
            save.abandon()
            raise

    def _schedule(self, original: Callable[..., Any], async_request: Any) -> Any:
        """The writer process measures what it wrote; the host's finalisers publish it last."""
        save = self._saving
        if save is None:
            return original(async_request)
        rank = team_of(self._host).rank
        write = async_request.async_fn
        if write is not None:
            async_request = async_request._replace(async_fn=functools.partial(write_and_seal, write, str(save.staged), rank))

        def publish() -> None:
            if write is None:
                seal(save.staged, rank)
            self._commit(save)

        async_request.add_finalize_fn(publish)
        return original(async_request)

    def _commit(self, save: Save) -> None:
        try:
            save.commit(sealed=True)
        except CheckpointError as error:
            if getattr(self._host.args, "ckpt_save_failure", "stop") != "continue":
                raise
            logger.warning("%s Training goes on (--ckpt-save-failure continue).", error)
        else:
            self._saved(save)

    def _saved(self, save: Save) -> None:
        self._host.events.fire("checkpoint_saved", iteration=save.iteration, directory=str(save.final))

    def _name(self, original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        """Path of a checkpoint or of one of its files: staged while saving, where it was found while loading."""
        path = original(*args, **kwargs)
        if self._saving is not None:
            return self._saving.redirect(path)
        if self._loading is not None:
            root, found = self._loading
            usual = root / f"iter_{found.iteration:07d}"
            if not found.release and found.directory != usual and Path(path).is_relative_to(usual):
                return str(found.directory / Path(path).relative_to(usual))
        return path

    def _tracker_name(self, original: Callable[..., str], checkpoints_path: str) -> str:
        """While saving, the host's own tracker write goes nowhere: the tracker is published with the directory."""
        if self._saving is not None and Path(checkpoints_path) == self._saving.root:
            return os.devnull
        return original(checkpoints_path)

    # --- loading ---

    def _load(self, original: Callable[..., Any], load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """Choose and verify, then let the host read that checkpoint; ranks agree on it."""
        found = self._found(load_dir, args)
        if found is None:
            return original(load_dir, args, *rest, **kwargs)
        step = getattr(args, "ckpt_step", None)
        self._loading = (Path(load_dir), found)
        try:
            if not found.release:
                args.ckpt_step = found.iteration
            return original(load_dir, args, *rest, **kwargs)
        finally:
            args.ckpt_step = step
            # The host reads the common part first and the rest in a second call: both must be of one checkpoint.
            first_part = bool(rest[0] if rest else kwargs.get("rank0")) and dist.is_initialized()
            self._loading = self._loading if first_part else None

    def _found(self, load_dir: Any, args: Any) -> Found | None:
        if load_dir is None:
            return None
        if self._loading is not None and self._loading[0] == Path(load_dir):
            return self._loading[1]
        mode = getattr(args, "ckpt_verify", "full")
        team = team_of(self._host)
        if not dist.is_initialized() and getattr(args, "world_size", 1) > 1:
            mode, team = "size" if mode == "full" else mode, Team()  # arguments only; weights are verified later
        return find_checkpoint(
            load_dir, save=getattr(args, "save", None), step=getattr(args, "ckpt_step", None), mode=mode, team=team
        )

    def _read_tracker(self, original: Callable[..., Any], tracker_filename: str) -> Any:
        """(iteration, is a release) of the checkpoint that was chosen; the host exits on a tracker it cannot read."""
        if self._loading is not None and Path(tracker_filename).parent == self._loading[0]:
            found = self._loading[1]
            return found.iteration, found.release
        return original(tracker_filename)


def write_and_seal(write: Callable[..., Any], staged: str, rank: int, *args: Any, **kwargs: Any) -> Any:
    """Body of the writer process: the host's write, then a receipt of sizes and checksums."""
    result = write(*args, **kwargs)
    seal(staged, rank)
    return result
