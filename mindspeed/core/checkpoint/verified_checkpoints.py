"""Verified checkpoints: files are checked before a weight is used, shapes are compared, strangers' pickles are fenced in.

The method is the package `mindspeed.checkpoint`, which the built-in trainer calls itself. This feature
brings its flags to every host, and for hosts that save and load by their own code it adds a manifest to each
finished checkpoint and compares the saved arguments with the run's as soon as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed.checkpoint import MODES, Team, add_manifest, restricted_load, restricted_metadata
from mindspeed.checkpoint.structure import checkpoint_format
from mindspeed.patching.feature import Feature
from mindspeed.patching.flags import flag
from mindspeed.patching.patch import Patch, wrap

if TYPE_CHECKING:
    from mindspeed.host.protocol import Host

_SIZES = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_METADATA_READER = "torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata"


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """Flags of checkpoint safety."""

    ckpt_verify: str = flag(
        "full",
        "How a checkpoint is checked before it is used: full compares checksums, size names and sizes, off nothing.",
        choices=MODES,
    )
    ckpt_trusted_load: str = flag(
        "on",
        "Whether checkpoint files may name any Python class: off admits tensors, plain data and Megatron's own types only.",
        choices=("on", "off"),
    )
    ckpt_save_failure: str = flag(
        "stop",
        "What a save that the file system refuses does to the run: stop it, or continue with a warning.",
        choices=("stop", "continue"),
    )


def checkpoint_directory(directory: Any, iteration: int) -> Path | None:
    """Directory of one checkpoint, given it or the --save directory above it; None for what is not saved as files there."""
    for place in (Path(directory) / f"iter_{iteration:07d}", Path(directory)):
        if place.is_dir() and checkpoint_format(place):
            return place
    return None


def team_of(host: Host) -> Team:
    """The host's ranks as a `Team`; one rank where nothing is distributed."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Team()

    def gather(item: Any) -> list[Any]:
        everything: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everything, item)
        return everything

    return Team(dist.get_rank(), dist.get_world_size(), gather)


class VerifiedCheckpoints(Feature):
    """Check checkpoints before a weight is used: files against checksums, shapes against the run, pickles on request."""

    level = 0
    flags = CheckpointFlags
    page = "checkpoints"

    def patches(self, flags: CheckpointFlags, host: Host) -> Iterator[Patch]:
        """With `--ckpt-trusted-load off`, both places where checkpoint code unpickles."""
        if flags.ckpt_trusted_load == "off":
            yield wrap("torch:load", restricted_load, reason="--ckpt-trusted-load off: no class outside the list is built")
            yield wrap(_METADATA_READER, restricted_metadata, reason="--ckpt-trusted-load off: .metadata is a pickle as well")

    def subscribe(self, flags: CheckpointFlags, host: Host) -> None:
        """Manifests for finished checkpoints; hosts compare shapes when they load."""
        if flags.ckpt_verify == "off":
            return

        def saved(iteration: int, directory: Any) -> None:
            args = vars(host.args)
            world = {name: int(args[name]) for name in _SIZES if args.get(name)}
            place = checkpoint_directory(directory, iteration)
            if place is None:
                return
            add_manifest(place, iteration, team=team_of(host), format=args.get("ckpt_format") or "torch_dist", world=world)

        host.events.on("checkpoint_saved", saved)
