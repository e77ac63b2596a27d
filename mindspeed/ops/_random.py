"""Random state of dropout operators: drawn once in forward, replayed in backward, governed by the device's generator."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(device: torch.device, count: int) -> Tensor:
    """`(seed, offset)` as an int64 CPU tensor for `count` numbers from the default generator of `device`.

    A CPU gives a fresh seed and offset 0. Other devices give their Philox seed and offset and move the offset on, so that no
    synchronisation is needed and activation checkpointing and random-state trackers replay the same numbers.
    """
    if device.type in ("cpu", "meta"):
        return torch.cat([torch.randint(0, 2**63 - 1, (1,), device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu")])
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    generator = module.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + (count + 3) // 4 * 4)
    # of 64 bits without sign; on the CPU under any default device, so that reading it waits for nothing
    seed = generator.initial_seed()
    return torch.tensor([seed - (seed >> 63 << 64), offset], dtype=torch.int64, device="cpu")


def keep_mask(rng: Tensor | None, shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Boolean mask, True = kept with probability 1-p; the same for the same `rng`. All True or all False for p 0 and 1."""
    if rng is None:
        return torch.full(shape, p < 1.0, dtype=torch.bool, device=device)
    seed, offset = rng.tolist()
    generator = torch.Generator(device).manual_seed((seed + offset * 0x9E3779B97F4A7C15) % (1 << 63))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - p, generator=generator)
