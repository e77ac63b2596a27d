"""Recompute counts per pipeline rank: `--recompute-num-layers` counts once for all chunks of a rank.

With virtual pipeline stages the host recomputes that many layers in every chunk, so memory moves in steps
of one layer per chunk. Counted per rank, layer l of chunk v stands at position `l * chunks + v`, and the
first `--recompute-num-layers` positions are recomputed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspeed.patching import Feature, Patch, Problem, RunShape, flag, wrap

if TYPE_CHECKING:
    from mindspeed.host.protocol import Host

# --- the method ------------------------------------------------------------------------------------------


def layers_of_chunk(per_rank: int, chunk: int, chunks: int) -> int:
    """How many layers of a chunk stand at positions `layer * chunks + chunk` below `per_rank`."""
    return max(0, -(-(per_rank - chunk) // chunks))


# --- the declaration -------------------------------------------------------------------------------------

_STATE = "megatron.core.parallel_state"
_FORWARD = "megatron.core.transformer.transformer_block:TransformerBlock._checkpointed_forward"


@dataclass(frozen=True, kw_only=True)
class PerRankFlags:
    """Flag of per-rank counting."""

    enable_recompute_layers_per_pp_rank: bool = flag(
        False, "Let --recompute-num-layers count the layers of a pipeline rank instead of those of each virtual stage."
    )


class EnableRecomputeLayersPerPpRank(Feature):
    """Count recomputed layers per pipeline rank instead of per virtual pipeline stage."""

    flags = PerRankFlags

    def check(self, flags: PerRankFlags, run: RunShape) -> Iterator[Problem]:
        """Counting needs the method `block`, and no more layers than a rank has."""
        option = "--enable-recompute-layers-per-pp-rank"
        method = run.get("recompute_method")
        if run.get("recompute_granularity") != "full" or method != "block":
            yield Problem(
                option,
                None,
                f"chooses layers for --recompute-granularity full --recompute-method block (given {method or 'none'})",
                f"use that method, or remove {option}",
            )
            return
        layers = run.num_layers // run.get("pipeline_model_parallel_size", 1)
        count = run.get("recompute_num_layers") or 0
        even = not run.get("pipeline_num_transformer_layers") and run.get("decoder_first_pipeline_num_layers") is None
        if even and count > layers:
            yield Problem("--recompute-num-layers", count, f"a pipeline rank has {layers} layers", f"use at most {layers}")

    def patches(self, flags: PerRankFlags, host: Host) -> Iterator[Patch]:
        """The count that the host compares layer indices with, for the chunk that is running."""
        chunk_of_now = host.load(f"{_STATE}:get_virtual_pipeline_model_parallel_rank")
        chunks_of_rank = host.load(f"{_STATE}:get_virtual_pipeline_model_parallel_world_size")

        def checkpointed_forward(original: Callable[..., Any], block: Any, *args: Any, **kwargs: Any) -> Any:
            shared = block.config
            own = copy.copy(shared)
            own.recompute_num_layers = layers_of_chunk(shared.recompute_num_layers, chunk_of_now() or 0, chunks_of_rank() or 1)
            block.config = own
            try:
                return original(block, *args, **kwargs)
            finally:
                block.config = shared

        yield wrap(_FORWARD, checkpointed_forward, reason="layers are counted per pipeline rank")
