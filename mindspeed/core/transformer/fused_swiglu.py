"""Fused SwiGLU: bias, gate and product in one operator that keeps its input only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from mindspeed.core.fusions import fused_bias_swiglu as ours
from mindspeed.core.transformer.fused_choice import configs_say, contradictions, why_fused
from mindspeed.ops.swiglu import weighted_swiglu
from mindspeed.patching import Change, Feature, Patch, Problem, RunShape, flag, replace, wrap

OPTION = "--use-fused-swiglu"
HOST = "megatron.core.fusions.fused_bias_swiglu"
FUNCTIONS = (ours.SwiGLUFunction, ours.BiasSwiGLUFunction, ours.WeightedSwiGLUFunction)


@dataclass(frozen=True, kw_only=True)
class SwigluFlags:
    """Flags of `FusedSwiglu`."""

    use_fused_swiglu: bool = flag(False, "Compute SwiGLU with one fused operator on any device.")


class FusedSwiglu(Feature):
    """Compute SwiGLU, with its bias or its weight per token, in one fused operator."""

    level = 1
    page = "fused-operators"
    flags = SwigluFlags
    operators = ("swiglu", "bias_swiglu", "swiglu_weighted")

    def why(self, flags: SwigluFlags, run: RunShape) -> str:
        """The flag, or a device with a kernel."""
        wanted = bool(run.get("swiglu")) and run.get("bias_swiglu_fusion", True)
        return why_fused("swiglu", "swiglu", run, asked=OPTION if flags.use_fused_swiglu else "", wanted=wanted)

    def normalise(self, flags: SwigluFlags, run: RunShape) -> Iterator[Change]:
        """A program's config has a field for it, which is off by default there."""
        if flags.use_fused_swiglu and run.get("bias_activation_fusion") is False:
            yield Change("bias_activation_fusion", True, f"{OPTION} replaces the fused form of the host")

    def check(self, flags: SwigluFlags, run: RunShape) -> Iterator[Problem]:
        """A request must be one that can be granted."""
        if not flags.use_fused_swiglu:
            return
        if not run.get("swiglu"):
            yield Problem(OPTION, None, "needs --swiglu", f"add --swiglu or remove {OPTION}")
        declined = "" if run.get("bias_swiglu_fusion", True) else "--no-bias-swiglu-fusion"
        yield from contradictions("swiglu", OPTION, run, declined)

    def patches(self, flags: SwigluFlags, host: Any) -> Iterator[Patch]:
        """The host's three autograd functions keep their names; experts of one grouped layer have a formula of their own."""
        for function in FUNCTIONS:
            for method in ("forward", "backward"):
                reason = "computes SwiGLU with one operator"
                yield replace(f"{HOST}:{function.__name__}.{method}", getattr(function, method), reason=reason)
        yield wrap(
            "megatron.core.transformer.moe.experts:GroupedMLP.__init__",
            build_experts,
            reason="gives experts the operator that also multiplies by the router's weight",
        )
        if flags.use_fused_swiglu:
            yield from configs_say("bias_activation_fusion", _is_swiglu, host)


def _is_swiglu(config: Any) -> bool:
    return bool(config.gated_linear_unit) and config.activation_func is functional.silu


def build_experts(original: Callable[..., None], experts: Any, *args: Any, **kwargs: Any) -> None:
    """Exchange the experts' gated SiLU after they were built; other activations stay the host's."""
    original(experts, *args, **kwargs)
    config = experts.config
    if _is_swiglu(config) and config.bias_activation_fusion:
        experts.activation_func_with_probs = weighted


def weighted(x: Tensor, probs: Tensor) -> Tensor:
    """`swiglu(x) * probs`; x: [T, 2F], probs: [T, 1]."""
    return weighted_swiglu(x, probs)
