"""LayerNorm under the names of Apex, which the host looks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mindspeed.ops.layer_norm import layer_norm


def fused_layer_norm_affine(
    input: Tensor, weight: Tensor, bias: Tensor | None, normalized_shape: int | Sequence[int], eps: float = 1e-6
) -> Tensor:
    """LayerNorm over the last dimensions, which `normalized_shape` names and `weight` has."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"fused_layer_norm_affine: input must end in shape {shape}, got {tuple(input.shape)}")
    flat = input.flatten(-len(shape)) if len(shape) > 1 else input
    return layer_norm(flat, weight.flatten(), None if bias is None else bias.flatten(), eps).view(input.shape)


class FusedLayerNormAffineFunction:
    """`apply(input, weight, bias, normalized_shape, eps)`; keeps the input and two numbers per row."""

    @staticmethod
    def apply(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:
        """LayerNorm; `memory_efficient` (recompute the input from the output) is not offered."""
        refuse_memory_efficient(memory_efficient)
        return fused_layer_norm_affine(input, weight, bias, normalized_shape, eps)


class FastLayerNormFN:
    """`apply(input, weight, bias, eps)`."""

    @staticmethod
    def apply(input: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, memory_efficient: bool = False) -> Tensor:
        """LayerNorm over the last dimension."""
        refuse_memory_efficient(memory_efficient)
        return layer_norm(input, weight, bias, eps)


def refuse_memory_efficient(memory_efficient: bool) -> None:
    """Raise ValueError instead of ignoring the option."""
    if memory_efficient:
        raise ValueError("memory_efficient_layer_norm: the fused LayerNorm keeps its input; set it to False")
