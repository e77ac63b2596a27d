"""Fused masked softmax of the host's unfused attention: scale, mask and softmax in one operator that keeps its output only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from mindspeed.core.fusions import fused_softmax as ours
from mindspeed.core.transformer.fused_choice import is_disabled, uses_transformer_engine, why_fused
from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax
from mindspeed.patching import Feature, NoFlags, Patch, RunShape, replace, wrap

HOST = "megatron.core.fusions.fused_softmax"


class FusedSoftmax(Feature):
    """Compute scale, mask and softmax of attention scores in one fused operator."""

    level = 1
    page = "fused-operators"
    operators = ("scaled_masked_softmax",)

    def why(self, flags: NoFlags, run: RunShape) -> str:
        """Fusion in a program's config, or a device with a kernel, for attention in 16 bits that builds all scores."""
        fused = run.get("masked_softmax_fusion")
        if not fused or is_disabled("softmax", run) or _no_scores(run):
            return ""
        wanted = bool(run.get("fp16") or run.get("bf16"))
        asked = "masked_softmax_fusion" if "masked_softmax_fusion" in run.given else ""
        return why_fused("softmax", "scaled_masked_softmax", run, asked=asked, wanted=wanted)

    def patches(self, flags: NoFlags, host: Any) -> Iterator[Patch]:
        """The host's module asks whether a kernel is there, and then calls it."""
        module = f"{HOST}:FusedScaleMaskSoftmax"
        yield wrap(f"{module}.is_kernel_available", can_fuse, reason="our operator has no limits of size")
        yield wrap(f"{module}.forward_fused_softmax", softmax, reason="computes attention probabilities with one operator")
        for stand_in in (ours.ScaledUpperTriangMaskedSoftmax, ours.ScaledMaskedSoftmax, ours.ScaledSoftmax):
            reason = "the host's version needs a compiled extension"
            yield replace(f"{HOST}:{stand_in.__name__}", stand_in, reason=reason, unrelated=True)


def _no_scores(run: RunShape) -> bool:
    """Whether attention runs in a kernel that never builds the scores."""
    return bool(run.get("use_flash_attn")) or uses_transformer_engine(run)


def can_fuse(original: Callable[..., bool], module: Any, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
    """Whether fusion was asked for and the scores have 16 bits; a causal mask that nobody built needs a square of scores."""
    square = sq == sk or mask is not None or not _is_causal(module)
    return bool(module.scaled_masked_softmax_fusion and module.input_in_float16 and square)


def softmax(original: Callable[..., Tensor], module: Any, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities of scores [B, N, Q, K]; a mask that is given says everything, as in the host's torch formula."""
    scale = 1.0 if module.scale is None else float(module.scale)
    return scaled_masked_softmax(scores, mask, scale, causal=mask is None and _is_causal(module))


def _is_causal(module: Any) -> bool:
    return module.attn_mask_type.name == "causal"
