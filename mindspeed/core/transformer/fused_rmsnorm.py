"""Fused RMSNorm: every RMSNorm of the model runs as one operator that rounds once and keeps one number per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mindspeed.core.fusions.fused_rms_norm import RMSNorm
from mindspeed.core.transformer.fused_choice import contradictions, uses_transformer_engine, why_fused
from mindspeed.patching import Feature, Patch, Problem, RunShape, flag, wrap

OPTION = "--use-fused-rmsnorm"


@dataclass(frozen=True, kw_only=True)
class RmsnormFlags:
    """Flags of `FusedRmsnorm`."""

    use_fused_rmsnorm: bool = flag(False, "Compute RMSNorm with one fused operator on any device.")


class FusedRmsnorm(Feature):
    """Compute RMSNorm with one fused operator."""

    level = 1
    page = "fused-operators"
    flags = RmsnormFlags
    operators = ("rms_norm",)

    def why(self, flags: RmsnormFlags, run: RunShape) -> str:
        """The flag, or a device with a kernel."""
        wanted = run.get("normalization") == "RMSNorm" and not run.get("no_persist_layer_norm") and not _elsewhere(run)
        return why_fused("rmsnorm", "rms_norm", run, asked=OPTION if flags.use_fused_rmsnorm else "", wanted=wanted)

    def check(self, flags: RmsnormFlags, run: RunShape) -> Iterator[Problem]:
        """A request must be one that can be granted."""
        if not flags.use_fused_rmsnorm:
            return
        if run.get("normalization") != "RMSNorm":
            rule = f"needs --normalization RMSNorm (given {run.get('normalization')})"
            yield Problem(OPTION, None, rule, f"add --normalization RMSNorm or remove {OPTION}")
        if _elsewhere(run):
            yield Problem(OPTION, None, f"{_elsewhere(run)} has norms of its own", f"remove {OPTION}")
        declined = "--no-persist-layer-norm" if run.get("no_persist_layer_norm") else ""
        yield from contradictions("rmsnorm", OPTION, run, declined)

    def patches(self, flags: RmsnormFlags, host: Any) -> Iterator[Patch]:
        """The host makes all its norms through one constructor when Transformer Engine is not used."""
        yield wrap(
            "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
            build_norm,
            reason="makes RMSNorm a module of one fused operator",
        )


def _elsewhere(run: RunShape) -> str:
    """The flag whose feature or host code makes norms in another way."""
    if run.get("tp_2d"):
        return "--tp-2d"
    return "--transformer-impl transformer_engine" if uses_transformer_engine(run) else ""


def build_norm(
    original: Callable[..., Any],
    cls: type,
    config: Any,
    hidden_size: int,
    eps: float = 1e-5,
    persist_layer_norm: bool = False,
    zero_centered_gamma: bool = False,
    normalization: str = "LayerNorm",
) -> Any:
    """Our RMSNorm where the config asks for RMSNorm, with the parameter marked for sequence parallelism; else the host's norm.

    Raises:
        ValueError: the config wants the input recomputed from the output, which the operator does not do.
    """
    if config.normalization != "RMSNorm":
        return original(cls, config, hidden_size, eps, persist_layer_norm, zero_centered_gamma, normalization)
    if getattr(config, "memory_efficient_layer_norm", False):
        raise ValueError("memory_efficient_layer_norm: the fused RMSNorm keeps its input; set it to False")
    settings = SimpleNamespace(
        layernorm_zero_centered_gamma=bool(config.layernorm_zero_centered_gamma or zero_centered_gamma),
        sequence_parallel=config.sequence_parallel,
    )
    return RMSNorm(hidden_size, eps, config=settings)
