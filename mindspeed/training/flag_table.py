"""The trainer's flags as data: Megatron-LM's names, types and defaults for the part of it that the trainer serves.

One row per flag, grouped as `--help` shows them. `tests/training/test_flag_table.py` compares the rows with
a recording of Megatron-LM's own parser. Flags of features are not here; they stand beside the features.
"""

from __future__ import annotations

from collections.abc import Iterator

from mindspeed.patching.flags import FlagSpec
from mindspeed.training import flags_model, flags_run

GROUPS: dict[str, tuple[FlagSpec, ...]] = {
    "network size": flags_model.NETWORK,
    "multi-latent attention": flags_model.LATENT_ATTENTION,
    "regularisation": flags_model.REGULARISATION,
    "training": flags_model.TRAINING,
    "recompute": flags_model.RECOMPUTE,
    "learning rate": flags_model.LEARNING_RATE,
    "initialisation": flags_model.INITIALISATION,
    "mixed precision": flags_model.MIXED_PRECISION,
    "parallelism": flags_run.PARALLEL,
    "data parallelism": flags_run.DATA_PARALLEL,
    "mixture of experts": flags_model.MIXTURE_OF_EXPERTS,
    "validation": flags_run.VALIDATION,
    "data": flags_run.DATA,
    "tokenizer": flags_run.TOKENIZER,
    "checkpoints": flags_run.CHECKPOINT,
    "logging": flags_run.LOGGING,
    "built-in trainer": flags_run.OWN,
}


def every_flag() -> Iterator[FlagSpec]:
    """All rows, in the order of the groups."""
    for flags in GROUPS.values():
        yield from flags
