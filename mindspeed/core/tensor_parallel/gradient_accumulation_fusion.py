"""Gradient-accumulation fusion: weight gradients are added to `main_grad` inside the product, without a rounded temporary."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16, npu_matmul_add_fp32
from mindspeed.patching import Feature, NoFlags, Patch, Problem, RunShape, replace

EXTENSION = "fused_weight_gradient_mlp_cuda"
LAYERS = "megatron.core.tensor_parallel.layers"


class GradientAccumulationFusion(Feature):
    """Add weight gradients of linear layers to `main_grad` in one operator; the host's flag is on by default."""

    level = 1
    page = "fused-operators"
    operators = ("matmul_add_",)

    def why(self, flags: NoFlags, run: RunShape) -> str:
        """The host's flag, unless the host's own extension serves it."""
        if not run.get("gradient_accumulation_fusion") or has_extension():
            return ""
        return "host's default"

    def check(self, flags: NoFlags, run: RunShape) -> Iterator[Problem]:
        """One place of the host imports the extension by name."""
        if run.get("defer_embedding_wgrad_compute"):
            yield Problem(
                "--defer-embedding-wgrad-compute",
                None,
                f"needs the extension {EXTENSION} of Apex, which is not installed",
                "remove it or install Apex",
            )

    def patches(self, flags: NoFlags, host: Any) -> Iterator[Patch]:
        """The two functions that the backward of linear layers calls."""
        for name, operator in (("wgrad_gemm_accum_fp32", npu_matmul_add_fp32), ("wgrad_gemm_accum_fp16", npu_matmul_add_fp16)):
            yield replace(f"{LAYERS}:{EXTENSION}.{name}", operator, reason="adds the product to main_grad in float32")


def has_extension() -> bool:
    """Whether the host's own extension can be imported."""
    return importlib.util.find_spec(EXTENSION) is not None
