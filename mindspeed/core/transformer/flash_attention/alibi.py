"""ALiBi: a penalty on distance in place of position embeddings (arXiv 2108.12409)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed.notices import warn_once
from mindspeed.patching import Change, Feature, Problem, RunShape, flag

# --- the method ------------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of all heads: a geometric series for a power of two, filled up from the next one otherwise."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (head + 1) / whole) for head in range(whole)]
    if whole < heads:
        slopes += [2.0 ** (-8 * (head + 1) / (2 * whole)) for head in range(2 * whole)][0::2][: heads - whole]
    return slopes


def slopes_of_rank(heads: int, rank: int, ranks: int, device: torch.device) -> Tensor:
    """Slopes [heads / ranks] fp32 of a tensor-parallel rank's contiguous heads."""
    share = heads // ranks
    return torch.tensor(alibi_slopes(heads)[rank * share : (rank + 1) * share], dtype=torch.float32, device=device)


def distance_of(kind: int | None, signed: bool) -> str:
    """What slopes multiply in an ALiBi type, by the names of `AlibiBias`."""
    if kind == 3:
        return "root"
    return "signed" if kind == 0 and signed else "absolute"


# --- the declaration -------------------------------------------------------------------------------------

EMBEDDINGS = ("learned_absolute", "rope", "mrope", "relative", "none", "alibi")


@dataclass(frozen=True, kw_only=True)
class AlibiFlags:
    """Flags of `Alibi`."""

    position_embedding_type: str = flag("learned_absolute", "How positions enter the model.", choices=EMBEDDINGS, of_host=True)
    alibi_fusion_attn_type: int | None = flag(
        None, "ALiBi penalty: 0 and 2 slope x distance, 3 slope x square root of the distance; 2 by default."
    )
    alibi_diagonal_opposite: bool = flag(
        False, "ALiBi of type 0: signed instead of absolute distance; for layers that see the future."
    )
    square_alibi_mask: bool = flag(False, "Accepted for old scripts; changes nothing in this model.")
    fill_neg_inf: bool = flag(False, "Accepted for old scripts; changes nothing in this model.")


class Alibi(Feature):
    """Penalise distance inside attention instead of embedding positions."""

    flags = AlibiFlags
    needs = ("flash-attention",)
    switch = "--position-embedding-type alibi"

    def why(self, flags: AlibiFlags, run: RunShape) -> str:
        """`--position-embedding-type alibi`."""
        return "--position-embedding-type alibi" if flags.position_embedding_type == "alibi" else ""

    def normalise(self, flags: AlibiFlags, run: RunShape) -> Iterator[Change]:
        """Without a type there would be no positions at all."""
        if flags.alibi_fusion_attn_type is None:
            yield Change("alibi_fusion_attn_type", 2, "ALiBi needs a type, and 2 is its plain form")

    def host_overrides(self, flags: AlibiFlags, run: RunShape) -> dict[str, Any]:
        """The host does not know ALiBi; to its rules it is a model without position embeddings."""
        return {"position_embedding_type": "none"}

    def check(self, flags: AlibiFlags, run: RunShape) -> Iterator[Problem]:
        """Types and combinations."""
        kind = flags.alibi_fusion_attn_type
        if kind not in (None, 0, 2, 3):
            yield Problem("--alibi-fusion-attn-type", kind, "is no ALiBi type", "use 0, 2 or 3")
        if flags.alibi_diagonal_opposite and kind != 0:
            yield Problem(
                "--alibi-diagonal-opposite",
                None,
                f"needs --alibi-fusion-attn-type 0 (given {kind}): types 2 and 3 are absolute",
                "remove it or use type 0",
            )
        if flags.square_alibi_mask or flags.fill_neg_inf:
            warn_once("--square-alibi-mask and --fill-neg-inf change nothing in this model")
        algorithm = run.get("context_parallel_algo") or ""
        if (run.get("context_parallel_size") or 1) > 1:
            if "adaptive" in algorithm:
                yield Problem("--position-embedding-type", "alibi", f"does not work with {algorithm}", "use another algorithm")
            if run.platform == "npu" and run.get("attention_dropout"):
                rule = f"with --attention-dropout {run.attention_dropout} is not proved for context parallelism on npu"
                yield Problem("--position-embedding-type", "alibi", rule, "use --attention-dropout 0")
            if run.get("attention_mask_type") == "general":
                yield Problem("--position-embedding-type", "alibi", "needs --attention-mask-type causal", "remove general")
