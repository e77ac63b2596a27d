"""Fusion attention v2: the second generation of the vendor's operator, for ALiBi inside the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed.notices import log_once
from mindspeed.patching import Feature, Problem, RunShape, flag


@dataclass(frozen=True, kw_only=True)
class FusionAttentionV2Flags:
    """Flags of `FusionAttentionV2`."""

    use_fusion_attn_v2: bool = flag(
        False, "On NPU, use the second generation of the fused attention operator; implies --use-flash-attn."
    )


class FusionAttentionV2(Feature):
    """Use the vendor's second-generation attention operator, which knows ALiBi."""

    name = "fusion-attention-v2"
    flags = FusionAttentionV2Flags
    needs = ("flash-attention",)

    def check(self, flags: FusionAttentionV2Flags, run: RunShape) -> Iterator[Problem]:
        """Never refused; on other devices flash attention computes the same."""
        if run.platform != "npu":
            log_once("--use-fusion-attn-v2 changes nothing on %s: its kernels serve ALiBi already", run.platform)
        elif run.get("position_embedding_type") != "alibi":
            log_once("--use-fusion-attn-v2 is only needed for ALiBi; without it the first generation computes the same")
        return iter(())
