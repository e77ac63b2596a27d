"""Rotary position embedding with the host's signatures; cosines and sines are computed once per table of angles."""

# S positions, B batch, N heads, D head size, R rotated part, T packed tokens

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mindspeed.ops.npu_rotary_position_embedding import HALF, INTERLEAVED, npu_rotary_position_embedding


class AngleTables:
    """Cosines and sines by table of angles, dtype and factor; an entry lives as long as its table of angles."""

    def __init__(self) -> None:
        self.by_angles: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, freqs: Tensor, dtype: torch.dtype, mscale: float) -> tuple[Tensor, Tensor]:
        """`(cos(freqs) * mscale, sin(freqs) * mscale)` in `dtype`."""
        if torch.compiler.is_compiling() or freqs.requires_grad:
            return self.make(freqs, dtype, mscale)
        entries = self.by_angles.setdefault(freqs, {})
        key = dtype, mscale, freqs._version
        if key not in entries:
            entries[key] = self.make(freqs, dtype, mscale)
        return entries[key]

    @staticmethod
    def make(freqs: Tensor, dtype: torch.dtype, mscale: float) -> tuple[Tensor, Tensor]:
        """Compute the pair anew."""
        return (freqs.cos() * mscale).to(dtype), (freqs.sin() * mscale).to(dtype)


TABLES = AngleTables()


def apply_rotary_pos_emb_bshd(
    t: Tensor, freqs: Tensor, rotary_interleaved: bool = False, multi_latent_attention: bool = False, mscale: float = 1.0
) -> Tensor:
    """Rotate the first R elements of each head; t: [S, B, N, D], freqs: [S, 1 or B, 1, R].

    With `multi_latent_attention` neighbouring elements are first sorted into halves.
    """
    cos, sin = TABLES.get(freqs, t.dtype, mscale)
    return _rotate(t, cos, sin, rotary_interleaved, multi_latent_attention)


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, rotary_interleaved: bool, multi_latent_attention: bool) -> Tensor:
    if multi_latent_attention:
        size = cos.shape[-1]
        t = torch.cat([t[..., 0:size:2], t[..., 1:size:2], t[..., size:]], -1)
    return npu_rotary_position_embedding(t, cos, sin, INTERLEAVED if rotary_interleaved else HALF)


def packed_positions(cu_seqlens: Tensor, tokens: int, cp_rank: int = 0, cp_size: int = 1) -> Tensor:
    """Position of each of this rank's packed tokens in its sequence, without a synchronisation.

    cu_seqlens: [sequences + 1], of the whole sequences. With context parallelism a rank holds segments `cp_rank` and
    `2 * cp_size - 1 - cp_rank` of the 2 * cp_size equal segments of each sequence.
    """
    starts = cu_seqlens.to(torch.int64) // cp_size
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(starts, token, right=True) - 1
    own = token - starts[sequence]
    if cp_size == 1:
        return own
    segment = (starts.diff() // 2)[sequence]
    return torch.where(own < segment, cp_rank * segment + own, (2 * cp_size - 1 - cp_rank) * segment + own - segment)


def apply_rotary_pos_emb_thd(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> Tensor:
    """All packed sequences in one launch; t: [T, N, D], cu_seqlens: [sequences + 1], freqs: [longest, 1, 1, R]."""
    positions = packed_positions(cu_seqlens, t.shape[0], cp_rank, cp_size)
    cos, sin = (table[positions] for table in TABLES.get(freqs, t.dtype, mscale))
    return _rotate(t.unsqueeze(1), cos, sin, rotary_interleaved, multi_latent_attention).squeeze(1)


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    config: object,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> Tensor:
    """Packed form if `cu_seqlens` is given; reads `rotary_interleaved` and `multi_latent_attention` of config."""
    options = {
        "rotary_interleaved": bool(getattr(config, "rotary_interleaved", False)),
        "multi_latent_attention": bool(getattr(config, "multi_latent_attention", False)),
        "mscale": mscale,
    }
    if cu_seqlens is None:
        return apply_rotary_pos_emb_bshd(t, freqs, **options)
    return apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, **options, cp_rank=cp_rank, cp_size=cp_size)
