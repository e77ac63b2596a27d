"""Small numbers from the host to a device without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(
    values: Sequence[int] | Sequence[float] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """`values` as a tensor on `device` in `dtype` (that of the tensor; int64 for a list); the tensor itself if it is one.

    A plain copy to a GPU makes the host wait until the GPU has done all that it was given before. From page-locked memory
    the copy is one more piece of its work; torch keeps that memory until it is done. Other devices get a plain copy.
    """
    device = torch.device(device)
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=dtype or torch.int64, device="cpu")
    if values.device.type == "cpu" and device.type == "cuda" and values.numel() and not torch.compiler.is_compiling():
        return values.to(dtype or values.dtype).pin_memory().to(device, non_blocking=True)
    return values.to(device, dtype or values.dtype)
