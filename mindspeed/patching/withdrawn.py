"""Flags of older launch scripts that have no effect any more, with what to tell their users."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

# Pattern of the option -> (why it is gone, what to look at instead). The first pattern that fits counts.
_GONE: dict[str, tuple[str, str]] = {
    "--use-nanopipe*": ("legacy models only", "see --schedules-method"),
    "--use-pipe-experts": ("superseded by communication hiding", "see --moe-alltoall-overlap-comm or --moe-fb-overlap"),
    "--pipe-experts-multi-*": ("superseded by communication hiding", "see --moe-alltoall-overlap-comm or --moe-fb-overlap"),
    "--ampipe-*": ("legacy models only", "see --moe-fb-overlap"),
    "--use-ampipe": ("legacy models only", "see --moe-fb-overlap"),
    "--automated-pipeline*": ("legacy models only", "see --noop-layers and --pipeline-num-transformer-layers"),
    "--save-memory-ratio": ("part of the automated pipeline", "see --noop-layers and --pipeline-num-transformer-layers"),
    "--num-layer-list": ("part of the automated pipeline", "see --pipeline-num-transformer-layers"),
    "--recompute-module-list": ("part of the automated pipeline", "see --recompute-granularity"),
    "--recompute-type": ("part of the automated pipeline", "see --recompute-granularity"),
    "--optimized-mbs-*": ("part of the automated pipeline", "see --micro-batch-size"),
    "--mbs-idx": ("part of the automated pipeline", "see --micro-batch-size"),
    "--pp-schedule-list": ("part of the automated pipeline", "see --schedules-method"),
    "--adaptive-recompute-*": ("legacy models only", "see --swap-attention and --recompute-granularity"),
    "--adaptive-memory-optimization": ("legacy models only", "see --swap-attention and --smart-swap"),
    "--memory-fragmentation": ("the allocator does this now", "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
    "--enable-zero3": ("superseded", "see --layerzero and --use-torch-fsdp2"),
    "--use-nd-matmul": ("legacy models only", "see --tp-2d"),
    "--nd*-dim1-size": ("legacy models only", "see --tp-2d with --tp-x and --tp-y"),
    "--moe-model-type": ("legacy models only", "remove it; Megatron's mixture of experts is used"),
    "--expert-interval": ("legacy models only", "see --moe-layer-freq"),
    "--moe-train-capacity-factor": ("legacy models only", "see --moe-expert-capacity-factor"),
    "--noisy-gate-policy": ("legacy models only", "remove it"),
    "--enable-token-rearrange-opt": ("legacy models only", "see --moe-permute-fusion"),
    "--no-use-rts": ("legacy models only", "remove it"),
    "--moe-no-drop": ("legacy models only", "leave out --moe-expert-capacity-factor, and no token is dropped"),
    "--moe-dynamic-padding": ("legacy models only", "see --moe-pad-expert-input-to-capacity"),
    "--moe-use-sinkhorn": ("legacy models only", "see --moe-router-load-balancing-type sinkhorn"),
    "--moe-adaptive-recompute-activation*": ("superseded", "see --moe-zero-memory"),
    "--moe-bmm-mc2": ("legacy models only", "see --moe-alltoall-overlap-comm"),
    "--optimize-vpp-send-recv-comm": ("legacy models only", "see --optimize-send-recv-comm"),
    "--use-ema": ("renamed", "see --optimizer-selection fused_ema_adamw"),
    "--additional-config": ("legacy models only", "give the flags themselves"),
    "--add-dense-bias": ("legacy models only", "see --add-qkv-bias and --disable-bias-linear"),
    "--skip-bias-add": ("legacy models only", "remove it"),
    "--rope-scaling-*": ("legacy models only", "see --use-rope-scaling and --rope-scaling-factor"),
    "--yarn-scaling-factor": ("renamed", "see --rotary-scaling-factor"),
    "--auto-settings*": ("the tuner is a command of its own now", "see `mindspeed tune --help`"),
    "--target-nnodes": ("belongs to the tuner", "see `mindspeed tune --help`"),
    "--prof-file": ("belongs to the tuner", "see `mindspeed tune --help`"),
}

# Option -> values accepted without effect (None: a switch without a value).
_WITHOUT_EFFECT: dict[str, tuple[str, ...] | None] = {
    "--jit-compile": None,
    "--shape-order": ("SBH",),
}


@dataclass(frozen=True)
class Withdrawn:
    """An option that was understood once."""

    option: str
    why: str
    instead: str

    def __str__(self) -> str:
        return f"{self.option} was withdrawn ({self.why}); {self.instead}"


def withdrawn(option: str) -> Withdrawn | None:
    """What became of an option, or None when it never existed."""
    for pattern, (why, instead) in _GONE.items():
        if fnmatch.fnmatchcase(option, pattern):
            return Withdrawn(option, why, instead)
    return None


def without_effect() -> dict[str, tuple[str, ...] | None]:
    """Options that are accepted and ignored, with the values they take."""
    return dict(_WITHOUT_EFFECT)
