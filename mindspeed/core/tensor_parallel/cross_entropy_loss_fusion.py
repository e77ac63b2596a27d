"""Fused cross entropy: the loss over a vocabulary split over tensor-parallel ranks, without a softmax kept in float32."""

# S positions, B samples, V entries of the vocabulary on this rank

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mindspeed.core.transformer.fused_choice import configs_say
from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy
from mindspeed.patching import Feature, NoFlags, Patch, Problem, RunShape, replace

OPTION, IMPLEMENTATION = "--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl"
TARGET = "megatron.core.fusions.fused_cross_entropy:fused_vocab_parallel_cross_entropy"


class CrossEntropyLossFusion(Feature):
    """Compute the loss with one fused operator where the host's flag asks for its native fused form."""

    operators = ("vocab_parallel_cross_entropy",)

    def why(self, flags: NoFlags, run: RunShape) -> str:
        """The host's flag, unless Transformer Engine's form is chosen."""
        native = run.get("cross_entropy_fusion_impl", "native") == "native"
        return OPTION if run.get("cross_entropy_loss_fusion") and native else ""

    def host_overrides(self, flags: NoFlags, run: RunShape) -> dict[str, Any]:
        """Megatron-LM refuses its own fused form in deterministic runs; ours repeats exactly."""
        return {"cross_entropy_loss_fusion": False} if run.get("deterministic_mode") else {}

    def check_off(self, flags: NoFlags, run: RunShape) -> Iterator[Problem]:
        """The host notices at the first loss that Transformer Engine is missing; say so at start."""
        wanted = run.get("cross_entropy_loss_fusion") and run.get("cross_entropy_fusion_impl") == "te"
        if wanted and importlib.util.find_spec("transformer_engine") is None:
            yield Problem(
                IMPLEMENTATION,
                "te",
                "needs Transformer Engine, which is not installed",
                f"use {IMPLEMENTATION} native or install transformer-engine",
            )

    def patches(self, flags: NoFlags, host: Any) -> Iterator[Patch]:
        """The one function that all language models of the host call."""
        yield replace(TARGET, fused_vocab_parallel_cross_entropy, reason="computes the loss with one operator")
        yield from configs_say("cross_entropy_loss_fusion", _is_native, host)


def _is_native(config: Any) -> bool:
    return bool(config.cross_entropy_fusion_impl == "native")


def fused_vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Loss [S, B] in float32 of logits [S, B, V] and targets [S, B]; logits keep their values, their gradient has their dtype."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group)
