"""Norms for `--transformer-impl local` without Transformer Engine and APEX, sequence parallelism included.

The host's `WrappedTorchNorm` refuses sequence parallelism because it leaves its parameters unmarked: their
gradients would not be summed over the tensor-parallel ranks and the ranks would drift apart in silence.
With the mark nothing in the mathematics forbids it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mindspeed.patching.patch import Patch, replace
from mindspeed.platform import Platform


class ZeroCentredLayerNorm(nn.LayerNorm):
    """LayerNorm whose weight is stored minus one (`--apply-layernorm-1p`)."""

    def reset_parameters(self) -> None:
        """Start at the identity: a stored weight of zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` over its last dimension; any floating dtype."""
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ZeroCentredRMSNorm(nn.RMSNorm):
    """RMSNorm whose weight is stored minus one."""

    def reset_parameters(self) -> None:
        """Start at the identity: a stored weight of zero."""
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` over its last dimension; any floating dtype."""
        return functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


_KINDS: dict[tuple[str, bool], type[nn.Module]] = {
    ("LayerNorm", False): nn.LayerNorm,
    ("LayerNorm", True): ZeroCentredLayerNorm,
    ("RMSNorm", False): nn.RMSNorm,
    ("RMSNorm", True): ZeroCentredRMSNorm,
}


def build_norm(
    cls: type,
    config: Any,
    hidden_size: int,
    eps: float = 1e-5,
    persist_layer_norm: bool = False,
    zero_centered_gamma: bool = False,
    normalization: str = "LayerNorm",
) -> nn.Module:
    """Stand in for `WrappedTorchNorm.__new__`: a torch norm with its parameters marked for the host.

    The kind follows `config.normalization`, as in the host; persistence and memory-efficiency wishes are
    hints about speed and change no number.

    Raises:
        ValueError: a normalisation that megatron-core does not have.
    """
    kind = config.normalization
    if kind == "L2Norm":
        from megatron.core.transformer.torch_norm import L2Norm

        norm: nn.Module = L2Norm(hidden_size, eps=eps)
        return norm
    zero_centred = bool(config.layernorm_zero_centered_gamma or zero_centered_gamma)
    norm_class = _KINDS.get((kind, zero_centred))
    if norm_class is None:
        raise ValueError(f"normalization {kind!r} is unknown; use LayerNorm, RMSNorm or L2Norm")
    norm = norm_class(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def patches(platform: Platform) -> Iterator[Patch]:
    """Replace the constructor in place, so that every reference to the class sees it."""
    yield replace(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        build_norm,
        reason="sequence parallelism and the other norm options must work without Transformer Engine and APEX",
    )
