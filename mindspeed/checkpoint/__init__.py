"""Safety of checkpoint directories: written whole or not at all, verified before use, one writer at a time.

For whoever writes a training loop (no Megatron import in here; ranks arrive as a `Team`):

    team = Team(rank, world_size, gather)                         # gather: all_gather_object
    lock = SaveLock(args.save, team=team); lock.acquire()         # at start, when --save is given
    team.together(lambda: recover(args.save) if team.leads else None)   # and the lock is held: finish or remove remains

    found = find_checkpoint(args.load, save=args.save, mode=args.ckpt_verify, team=team)
    if found: read from found.directory; check_fits(vars(state["args"]), vars(args), format=...)

    with Save(args.save, iteration, team=team, format=args.ckpt_format, world=...,
              keep_training=args.ckpt_save_failure == "continue") as save:
        write files below save.staged (or to save.redirect(final path)); save.wrote(path) names the writer in errors

Do not write the tracker: `Save` does, last. For asynchronous saves see `Save.begin`, `seal`, `Save.commit`.

For a host with path functions of its own: while a save is under way, wrap its checkpoint-name function with
`save.redirect`, skip or redirect its tracker write, and leave the rest as it is; while loading, map
`<load>/iter_%07d` to `found.directory`. `--ckpt-trusted-load off`: wrap `torch:load` with `restricted_load`.
A checkpoint saved by other means gets its manifest by `add_manifest`.
"""

from mindspeed.checkpoint.compare import check_fits, optimizer_problems, shape_problems
from mindspeed.checkpoint.find import Found, find_checkpoint, read_tracker
from mindspeed.checkpoint.lock import SaveLock
from mindspeed.checkpoint.manifest import MODES, FileEntry, Manifest, read_manifest, verify
from mindspeed.checkpoint.recovery import recover
from mindspeed.checkpoint.restricted import load_restricted, restricted_load, restricted_metadata
from mindspeed.checkpoint.team import SOLO, Team
from mindspeed.checkpoint.transaction import Save, add_manifest, seal

__all__ = [
    "MODES",
    "SOLO",
    "FileEntry",
    "Found",
    "Manifest",
    "Save",
    "SaveLock",
    "Team",
    "add_manifest",
    "check_fits",
    "find_checkpoint",
    "load_restricted",
    "optimizer_problems",
    "read_manifest",
    "read_tracker",
    "recover",
    "restricted_load",
    "restricted_metadata",
    "seal",
    "shape_problems",
    "verify",
]
