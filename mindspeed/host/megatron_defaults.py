"""What Megatron-LM's own flags need so that its defaults run on every device; a feature of level 0."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

from mindspeed.core.transformer.fused_choice import is_disabled
from mindspeed.core.transformer.fused_rotary_pos_emb import why_ours
from mindspeed.errors import Problem
from mindspeed.host.repairs import transformer_engine
from mindspeed.patching.feature import Change, Feature, RunShape
from mindspeed.patching.flags import NoFlags
from mindspeed.platform import current, refused_on_cpu

MOCK_VOCABULARY = 4096  # the host's mock documents hold the ids 1 ... 4095, then the end-of-document id
_ONE_CONNECTION = "CUDA_DEVICE_MAX_CONNECTIONS"


class HostDefaults(Feature):
    """Defaults of Megatron-LM that assume CUDA, Transformer Engine or APEX, and wishes that nothing can grant."""

    name = "host-defaults"
    level = 0

    def normalise(self, flags: NoFlags, run: RunShape) -> Iterator[Change]:
        """Values for hosts without Transformer Engine, and the process-group backend of the platform."""
        if run.get("distributed_backend") == "nccl" and run.platform != "cuda":
            yield Change("distributed_backend", current().backend, f"platform {run.platform} communicates through it")
        if self._falls_back_to_local(run):
            yield Change("transformer_impl", "local", "Transformer Engine is not installed")
        if run.get("apply_rope_fusion") and (reason := self._why_no_fused_rope(run)):
            yield Change("apply_rope_fusion", False, reason)

    @staticmethod
    def _falls_back_to_local(run: RunShape) -> bool:
        wants = run.get("transformer_impl") == "transformer_engine"
        return wants and "transformer_impl" not in run.given and not transformer_engine.installed()

    @staticmethod
    def _why_no_fused_rope(run: RunShape) -> str:
        """Why the host's rope fusion cannot mean a kernel here, or ""."""
        if why_ours(run):
            by_itself = run.get("multi_latent_attention") or run.get("rotary_interleaved")
            return "the host has no fused call for this form; our operator serves its plain one" if by_itself else ""
        if is_disabled("rope", run):
            return "--disable-fused-ops names rope"
        return (
            ""
            if has_fused_rope()
            else "neither Transformer Engine nor APEX is installed, and none of our kernels was asked for"
        )

    def check(self, flags: NoFlags, run: RunShape) -> Iterator[Problem]:
        """What cannot work here, however the other flags stand."""
        if run.platform == "cpu":
            yield from refused_on_cpu(run._args, run.given)
        elif run.get("transformer_impl") == "transformer_engine" and not transformer_engine.installed():
            yield Problem(
                "--transformer-impl",
                "transformer_engine",
                "needs Transformer Engine, which is not installed",
                "use --transformer-impl local, or pip install transformer-engine",
            )
        yield from _mock_data(run)
        yield from _sequence_parallel(run)
        yield from _missing_load(run)


def _mock_data(run: RunShape) -> Iterator[Problem]:
    size = run.get("vocab_size")
    if run.get("mock_data") and run.get("tokenizer_type") == "NullTokenizer" and size is not None and size < MOCK_VOCABULARY:
        yield Problem(
            "--vocab-size",
            size,
            f"--mock-data makes token ids up to {MOCK_VOCABULARY - 1}",
            f"use --vocab-size {MOCK_VOCABULARY} or more",
        )


def _sequence_parallel(run: RunShape) -> Iterator[Problem]:
    tensor, sequence = run.get("tensor_model_parallel_size", 1), run.get("seq_length") or 0
    if run.get("sequence_parallel") and not run.get("unaligned_linear") and tensor > 1 and sequence % tensor:
        yield Problem(
            "--seq-length",
            sequence,
            f"--sequence-parallel cuts it into --tensor-model-parallel-size {tensor} equal parts",
            f"use {sequence - sequence % tensor}, or --unaligned-linear",
        )


def _missing_load(run: RunShape) -> Iterator[Problem]:
    """A directory that is not there means a typing error, unless an auto-resume script saves to it as well."""
    load = run.get("load")
    if not load or os.path.isdir(load) or run.get("pretrained_checkpoint"):
        return
    if os.path.abspath(load) != os.path.abspath(run.get("save") or ""):
        yield Problem(
            "--load",
            load,
            "there is no such directory, and the run would start from random weights",
            "correct the path, leave the flag out, or give the same directory to --save for a first run that resumes itself",
        )


def has_fused_rope() -> bool:
    """Whether the host's rotary embedding has a fused function to call."""
    utils: Any = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    return utils.fused_apply_rotary_pos_emb is not None or utils.fused_apply_rotary_pos_emb_thd is not None


def allow_one_connection(platform: str) -> None:
    """Satisfy the host's demand on a CUDA variable that means nothing on this platform."""
    if platform != "cuda":
        os.environ.setdefault(_ONE_CONNECTION, "1")
