"""Scaled masked softmax under the class names of the host, each with an `apply`."""

# B batch, N heads, Q query positions, K key positions

from __future__ import annotations

from torch import Tensor

from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax


class ScaledUpperTriangMaskedSoftmax:
    """Causal: keys after the query are excluded."""

    @staticmethod
    def apply(inputs: Tensor, scale: float) -> Tensor:
        """inputs: [B*N, Q, K]."""
        return scaled_masked_softmax(inputs, None, scale, causal=True)


class ScaledMaskedSoftmax:
    """Excluded where the mask is True."""

    @staticmethod
    def apply(inputs: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """inputs: [B, N, Q, K]; mask: [1 or B, 1 or N, Q, K], bool or uint8."""
        return scaled_masked_softmax(inputs, mask, scale)


class ScaledSoftmax:
    """Nothing is excluded."""

    @staticmethod
    def apply(inputs: Tensor, scale: float) -> Tensor:
        """inputs: [B, N, Q, K]."""
        return scaled_masked_softmax(inputs, None, scale)
