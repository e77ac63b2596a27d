"""Activations that fused operators take by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def fast_gelu(x: Tensor) -> Tensor:
    """`x / (1 + exp(-1.702 x))`."""
    return x * torch.sigmoid(1.702 * x)


BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "fastgelu": fast_gelu,
}
