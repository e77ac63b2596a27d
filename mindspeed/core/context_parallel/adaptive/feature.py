"""Flags of the adaptive algorithms and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed.core.context_parallel.adaptive.remap import CELL
from mindspeed.core.context_parallel.plan import ADAPTIVE, HYBRID_ADAPTIVE
from mindspeed.notices import warn_once
from mindspeed.patching import Feature, Problem, RunShape, flag

SLOW_LENGTH = 8192  # single tokens of longer sequences take too long to cluster


@dataclass(frozen=True, kw_only=True)
class AdaptiveFlags:
    """Flags of `AdaptiveContextParallel`."""

    adaptive_cp_without_coarse: bool = flag(False, "Remap single tokens instead of cells of 1024; for sequences below 8k.")
    adaptive_cp_dynamic_attn_mask: bool = flag(False, "Plan every batch anew, for masks that change in place.")
    adaptive_cp_only_reschedule: bool = flag(False, "Keep the order of tokens and adapt the schedule only.")
    adaptive_cp_manually_set_mask_list: bool = flag(False, "Take the grid of tiles and the tile masks that the program sets.")


class AdaptiveContextParallel(Feature):
    """Remap tokens and schedule tiles of a sparse custom mask so that all context-parallel ranks work."""

    flags = AdaptiveFlags
    needs = ("context-parallel",)

    def why(self, flags: AdaptiveFlags, run: RunShape) -> str:
        """An adaptive algorithm, or a flag that needs one."""
        algorithm = run.get("context_parallel_algo")
        if algorithm in (ADAPTIVE, HYBRID_ADAPTIVE) and (run.get("context_parallel_size") or 1) > 1:
            return f"--context-parallel-algo {algorithm}"
        return super().why(flags, run)

    def check(self, flags: AdaptiveFlags, run: RunShape) -> Iterator[Problem]:
        """Flags without an adaptive algorithm do nothing; contradictions."""
        algorithm = run.get("context_parallel_algo")
        if algorithm not in (ADAPTIVE, HYBRID_ADAPTIVE):
            given = [spec.option for spec in self.specs if getattr(flags, spec.dest)]
            yield Problem(
                " ".join(given), None, f"needs an adaptive algorithm (given {algorithm})", f"use {ADAPTIVE} or remove it"
            )
            return
        if flags.adaptive_cp_manually_set_mask_list and flags.adaptive_cp_dynamic_attn_mask:
            rule = "contradicts --adaptive-cp-dynamic-attn-mask: a grid by hand is not planned"
            yield Problem("--adaptive-cp-manually-set-mask-list", None, rule, "give one of the two")
        length = run.get("seq_length") or 0
        fine = flags.adaptive_cp_without_coarse or length % CELL != 0
        if fine and length > SLOW_LENGTH and not flags.adaptive_cp_only_reschedule:
            warn_once("adaptive context parallelism remaps %s single tokens; above %s this takes long", length, SLOW_LENGTH)
