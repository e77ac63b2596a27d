"""Documents in packed samples stay apart: attention inside a document, positions from its start if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mindspeed.core.context_parallel.documents import end_of_document
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import STORE
from mindspeed.patching import Feature, Patch, Problem, RunShape, flag, wrap

OPTION = "--reset-attention-mask"
FIXED = "--fix-sub-seq-length"


@dataclass(frozen=True, kw_only=True)
class ResetAttentionMaskFlags:
    """Flags of `ResetAttentionMask`."""

    fix_sub_seq_length: int = flag(
        0, "With --reset-attention-mask: a document ends every so many tokens, whatever they are; 0 goes by tokens.", at_least=0
    )


class ResetAttentionMask(Feature):
    """Keep attention inside each document of a packed sample, without masks of S x S.

    Works where flash attention does; without it the host builds dense masks itself.
    """

    flags = ResetAttentionMaskFlags

    def why(self, flags: ResetAttentionMaskFlags, run: RunShape) -> str:
        """`--reset-attention-mask`, or the flag that needs it."""
        if run.get("reset_attention_mask"):
            return OPTION
        return f"{FIXED} {flags.fix_sub_seq_length}" if flags.fix_sub_seq_length else ""

    def check(self, flags: ResetAttentionMaskFlags, run: RunShape) -> Iterator[Problem]:
        """Documents need somebody who keeps them apart, a token that ends them or a length, and no other mask."""
        fused = run.get("use_flash_attn") or (run.get("context_parallel_size") or 1) > 1
        if run.get("reset_attention_mask"):
            if STORE.is_set:
                yield Problem(OPTION, None, "a mask is set with set_attention_mask too", "pick one of the two")
            if run.get("tokenizer_type") == "NullTokenizer" and run.get("vocab_size") is None:
                yield Problem(OPTION, None, "needs a tokenizer with an end-of-document token", "choose another one")
            if not fused:
                yield from _dense_mask_rules(run, "add --use-flash-attn")
        size, length = flags.fix_sub_seq_length, run.get("seq_length")
        if size and not run.get("reset_attention_mask"):
            yield Problem(FIXED, size, f"needs {OPTION}", f"add {OPTION} or remove it")
        elif size and not fused:
            yield Problem(FIXED, size, "needs flash attention: masks of the data set go by tokens", "add --use-flash-attn")
        if length is not None and size > length:
            yield Problem(FIXED, size, f"must not exceed --seq-length {length}", f"use 1 to {length}")

    def check_off(self, flags: ResetAttentionMaskFlags, run: RunShape) -> Iterator[Problem]:
        """Below the level of this feature, only masks of the data set keep documents apart."""
        level = f"--optimization-level {self.level}"
        if flags.fix_sub_seq_length:
            yield Problem(FIXED, flags.fix_sub_seq_length, f"needs {level} (given {run.get('optimization_level')})", "give it")
        if run.get("reset_attention_mask"):
            yield from _dense_mask_rules(run, f"add --use-flash-attn at {level}")

    def patches(self, flags: ResetAttentionMaskFlags, host: Any) -> Iterator[Patch]:
        """Look at the tokenizer as soon as there is one, before any process group exists."""
        if not flags.fix_sub_seq_length:
            yield wrap(
                "training:build_tokenizer", _with_end, reason="refuses a tokenizer without end of document", optional=True
            )


def _dense_mask_rules(run: RunShape, remedy: str) -> Iterator[Problem]:
    """What leaves the host's own attention without a mask that keeps documents apart."""
    if run.get("create_attention_mask_in_dataloader") is False:
        rule = "needs flash attention, or masks from the data set, which --no-create-attention-mask-in-dataloader drops"
        yield Problem(OPTION, None, rule, remedy)
    elif _has_inner_chunks(run):
        rule = "needs flash attention where a pipeline chunk is neither first nor last: it gets no mask from the data set"
        yield Problem(OPTION, None, rule, remedy)


def _has_inner_chunks(run: RunShape) -> bool:
    """Whether the model is cut into more chunks than the first and the last, which alone read batches."""
    stages, chunks = run.get("pipeline_model_parallel_size") or 1, run.get("num_virtual_stages_per_pipeline_rank") or 1
    if size := run.get("num_layers_per_virtual_pipeline_stage"):
        chunks = (run.get("num_layers") or 0) // stages // size
    return stages > 1 and stages * chunks > 2


def _with_end(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Advice around the host's maker of tokenizers."""
    tokenizer = original(*args, **kwargs)
    end_of_document(tokenizer)
    return tokenizer
