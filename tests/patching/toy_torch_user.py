"""User code that took a function out of torch by name."""

from torch.nn.functional import silu

__all__ = ["silu"]
