"""Order and waste in megatron-core's attention modules and chained optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform import Platform

_ATTENTIONS = (
    "megatron.core.transformer.attention:SelfAttention",
    "megatron.core.transformer.attention:CrossAttention",
    "megatron.core.transformer.multi_latent_attention:MLASelfAttention",
)
_CHAIN = "megatron.core.optimizer.optimizer:ChainedOptimizer.count_zeros"


def projection_last(original: Callable[..., None], attention: Any, *args: Any, **kwargs: Any) -> None:
    """Register `linear_proj` after the input projections, in the order in which forward needs them.

    Gathers of parameters overlap with compute in module order; names and the state dict stay the same.
    """
    original(attention, *args, **kwargs)
    modules = attention._modules
    if "linear_proj" in modules:
        modules["linear_proj"] = modules.pop("linear_proj")


def zeros_when_asked(original: Callable[..., Any], chain: Any) -> Any:
    """Count zeros only for `--log-num-zeros-in-grad`; the host pays a pass and a collective in every step."""
    if not chain.chained_optimizers or chain.config.log_num_zeros_in_grad:
        return original(chain)
    return None


def patches(platform: Platform) -> Iterator[Patch]:
    """Repairs without effect on any number."""
    for attention in _ATTENTIONS:
        yield wrap(f"{attention}.__init__", projection_last, reason="parameter gathers follow module order")
    yield wrap(_CHAIN, zeros_when_asked, reason="nobody asked for the number of zeros")
