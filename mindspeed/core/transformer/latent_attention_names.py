"""Other spellings of the host's flags of multi-latent attention, as scripts for MindSpeed have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed.patching import Change, Feature, Problem, RunShape, flag

# Ours -> the host's, by destination.
SIZES = {"qk_nope_head_dim": "qk_head_dim", "qk_rope_head_dim": "qk_pos_emb_head_dim"}
SWITCH = "--multi-head-latent-attention"


@dataclass(frozen=True, kw_only=True)
class LatentAttentionFlags:
    """Flags of `LatentAttentionNames`."""

    multi_head_latent_attention: bool = flag(False, "The same as --multi-latent-attention.")
    qk_nope_head_dim: int | None = flag(None, "The same as --qk-head-dim.", at_least=1)
    qk_rope_head_dim: int | None = flag(None, "The same as --qk-pos-emb-head-dim.", at_least=1)


class LatentAttentionNames(Feature):
    """Accept the flags of multi-latent attention under the names that MindSpeed scripts use."""

    page = "latent-attention"
    flags = LatentAttentionFlags

    def normalise(self, flags: LatentAttentionFlags, run: RunShape) -> Iterator[Change]:
        """The host's flags get the values; one that was given itself stays, and `check` compares."""
        if flags.multi_head_latent_attention and not run.get("multi_latent_attention"):
            yield Change("multi_latent_attention", True, f"{SWITCH} means it")
        for ours, theirs in SIZES.items():
            value = getattr(flags, ours)
            if value is not None and theirs not in run.given:
                yield Change(theirs, value, f"{_option(ours)} means it")

    def check(self, flags: LatentAttentionFlags, run: RunShape) -> Iterator[Problem]:
        """Two values for one size, or sizes of an attention that the model has not."""
        for ours, theirs in SIZES.items():
            value = getattr(flags, ours)
            if value is None:
                continue
            if run.get(theirs) != value:
                rule = f"contradicts {_option(theirs)} {run.get(theirs)}, which means the same"
                yield Problem(_option(ours), value, rule, "give one of the two")
            if not run.get("multi_latent_attention"):
                yield Problem(_option(ours), value, "needs --multi-latent-attention", f"add it, or {SWITCH}")


def _option(dest: str) -> str:
    return "--" + dest.replace("_", "-")
