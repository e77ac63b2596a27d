"""Grouped products of experts on every device, with weight gradients added to `main_grad` inside the product if asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.fusions import grouped_matmul
from mindspeed.core.transformer.fused_choice import contradictions, is_disabled, uses_transformer_engine
from mindspeed.patching import Feature, Patch, Problem, RunShape, flag, replace, set_value

OPTION, HOST_OPTION = "--gemm-gradient-accumulation-fusion", "--moe-grouped-gemm"
UTIL = "megatron.core.transformer.moe.grouped_gemm_util"


@dataclass(frozen=True, kw_only=True)
class GroupedGemmFlags:
    """Flags of `GroupedGemm`."""

    gemm_gradient_accumulation_fusion: bool = flag(
        False, "Add weight gradients of grouped experts to main_grad inside the grouped product."
    )


def gmm(
    a: Tensor, b: Tensor, batch_sizes: Tensor | Sequence[int], trans_b: bool = False, *, accumulate: bool = False
) -> Tensor:
    """`a_g @ b_g` for consecutive groups of rows; a: [M, K], b: [G, K, N] or with `trans_b` [G, N, K], batch_sizes: [G].

    With `accumulate` the gradient of b goes to the `main_grad` of the parameter that b is a view of.

    Raises:
        ValueError: there is no `main_grad` to add to; the host's data-parallel wrapper makes it.
    """
    weight = b if b._base is None else b._base
    accumulate = accumulate and torch.is_grad_enabled() and weight.requires_grad
    return grouped_matmul.Ops.gmm(a, b, batch_sizes, trans_b, accumulate, weight if accumulate else None)


def plain_gmm(a: Tensor, b: Tensor, batch_sizes: Tensor | Sequence[int], trans_b: bool = False) -> Tensor:
    """The same as a loop of products, to compare with."""
    sizes = batch_sizes.tolist() if isinstance(batch_sizes, Tensor) else list(batch_sizes)
    weights = b.transpose(-2, -1) if trans_b else b
    return torch.cat([rows @ weight for rows, weight in zip(a.split(sizes), weights, strict=True)])


class GroupedGemm(Feature):
    """Compute all experts of a rank with grouped products, on every device and in every floating dtype."""

    level = 0
    flags = GroupedGemmFlags
    operators = ("gmm", "groupmatmul_add_")

    def why(self, flags: GroupedGemmFlags, run: RunShape) -> str:
        """The host's flag where the host's own layers serve it, or our flag."""
        if flags.gemm_gradient_accumulation_fusion:
            return OPTION
        return HOST_OPTION if run.get("moe_grouped_gemm") and not _served_by_te(run) else ""

    def host_overrides(self, flags: GroupedGemmFlags, run: RunShape) -> dict[str, Any]:
        """The host admits bf16 only, which is a limit of the package that we stand in for."""
        return {"moe_grouped_gemm": False} if run.get("moe_grouped_gemm") and not run.get("bf16") else {}

    def check(self, flags: GroupedGemmFlags, run: RunShape) -> Iterator[Problem]:
        """Accumulation needs grouped products of ours and gradients in float32."""
        if not flags.gemm_gradient_accumulation_fusion:
            return
        if not run.get("moe_grouped_gemm"):
            yield Problem(OPTION, None, f"needs {HOST_OPTION}", f"add {HOST_OPTION} or remove {OPTION}")
        elif _served_by_te(run):
            rule = "is for the host's own experts; --transformer-impl transformer_engine brings others"
            yield Problem(OPTION, None, rule, "use --transformer-impl local or --moe-use-legacy-grouped-gemm")
        if run.get("fp16") and not run.get("accumulate_allreduce_grads_in_fp32"):
            rule = "adds in float32, and main_grad has 16 bits with --fp16"
            yield Problem(OPTION, None, rule, "add --accumulate-allreduce-grads-in-fp32")
        yield from contradictions("gmm", OPTION, run)
        yield from contradictions("wgrad", OPTION, run)

    def patches(self, flags: GroupedGemmFlags, host: Any) -> Iterator[Patch]:
        """The module in which the host looks for the package."""
        accumulate = flags.gemm_gradient_accumulation_fusion
        run = RunShape(host.args, "")
        product = plain_gmm if is_disabled("gmm", run) else functools.partial(gmm, accumulate=accumulate)
        reason = "grouped products without the package grouped_gemm"
        ops = SimpleNamespace(gmm=product)
        yield set_value(f"{UTIL}:grouped_gemm", SimpleNamespace(ops=ops), reason=reason)
        yield set_value(f"{UTIL}:ops", ops, reason=reason)
        for name in ("grouped_gemm_is_available", "assert_grouped_gemm_is_available"):
            yield replace(f"{UTIL}:{name}", getattr(grouped_matmul, name), reason=reason)


def _served_by_te(run: RunShape) -> bool:
    return uses_transformer_engine(run) and not run.get("moe_use_legacy_grouped_gemm")
