"""Documents in packed samples stay apart: attention inside a document, positions from its start if asked for."""

from __future__ import annotations

from collections.abc import Iterator

from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import STORE
from mindspeed.patching import Feature, NoFlags, Problem, RunShape


class ResetAttentionMask(Feature):
    """Keep attention inside each document of a packed sample, without masks of S x S.

    Works where flash attention does; without it the host builds dense masks itself.
    """

    def why(self, flags: NoFlags, run: RunShape) -> str:
        """`--reset-attention-mask` together with fused attention."""
        fused = run.get("use_flash_attn") or (run.get("context_parallel_size") or 1) > 1
        return "--reset-attention-mask" if run.get("reset_attention_mask") and fused else ""

    def check(self, flags: NoFlags, run: RunShape) -> Iterator[Problem]:
        """Documents need a token that ends them, and no other mask."""
        if STORE.is_set:
            yield Problem("--reset-attention-mask", None, "a mask is set with set_attention_mask too", "pick one of the two")
        if run.get("tokenizer_type") == "NullTokenizer" and run.get("vocab_size") is None:
            yield Problem(
                "--reset-attention-mask", None, "needs a tokenizer with an end-of-document token", "choose another one"
            )
