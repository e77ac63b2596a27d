"""RMSNorm as a module with the host's constructor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindspeed.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension with one parameter, `weight`.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        sequence_parallel: marks the parameter, so that its gradient is summed over tensor-parallel ranks.
        config: object with optional attributes `use_fused_rmsnorm` (False selects the unfused form, which rounds the normalised
            value before it multiplies by the weight), `layernorm_zero_centered_gamma` (the parameter is stored minus one)
            and `sequence_parallel` (same as the argument).
    """

    def __init__(self, dim: int, eps: float = 1e-6, sequence_parallel: bool = False, config: object = None) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = bool(getattr(config, "layernorm_zero_centered_gamma", False))
        self.fused = getattr(config, "use_fused_rmsnorm", None) is not False
        self.weight = nn.Parameter(torch.zeros(dim) if self.zero_centered else torch.ones(dim))
        self.weight.sequence_parallel = sequence_parallel or bool(getattr(config, "sequence_parallel", False))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, in its dtype."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.fused:
            return rms_norm(x, weight, self.eps)
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * weight
