"""One attention mask per process, set by the user or generated, instead of one per micro batch from the data set.

`set_attention_mask(mask)` applies to all following micro batches until it is changed or set to None, or the run ends
(the trainer returns, `mindspeed.revert()`): a custom mask replaces the causal rule of the layers. Without one nothing of size S x S exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COMPRESSED = 2048  # side of the template that vendor kernels take for causal and band masks


class MaskStore:
    """The mask in force, and the one that was generated last.

    Attributes:
        refusal: why the present run cannot apply a mask; empty when it can, or when none has started.
    """

    def __init__(self) -> None:
        self.custom: Tensor | None = None
        self.tiles: tuple[Tensor | None, ...] | None = None
        self.generated: Tensor | None = None
        self.refusal = ""

    def begin_run(self, refusal: str = "") -> None:
        """A run starts that applies masks, or, for the reason given, does not; a mask that is set already stays."""
        self.refusal = refusal

    def end_run(self) -> None:
        """The run is over: its mask is not that of the next one."""
        self.clear()
        self.refusal = ""

    def clear(self) -> None:
        """Back to no mask."""
        self.custom, self.tiles, self.generated = None, None, None

    @property
    def is_set(self) -> bool:
        """Whether the user gave a mask."""
        return self.custom is not None or self.tiles is not None


STORE = MaskStore()


def set_attention_mask(mask: Tensor | Sequence[Tensor | None] | None) -> None:
    """Use a mask for the following micro batches, on every rank the same; None goes back to the layers' own rule.

    Args:
        mask: bool [S, S] or [1 or b, 1, S, S] over the whole sequence, True where hidden. Or, with
            `--attention-mask-type general`, the tiles of this rank's row alone, one for each key block of the ring in
            order: bool [S / R, S / R], None where all is visible.

    Raises:
        TypeError: not a boolean tensor.
        ValueError: another shape, or a run whose attention cannot apply it.
    """
    if mask is None:
        STORE.clear()
        return
    if STORE.refusal:
        raise ValueError(f"set_attention_mask: {STORE.refusal}")
    if isinstance(mask, Sequence):
        STORE.clear()
        STORE.tiles = tuple(None if tile is None else _checked_tile(tile) for tile in mask)
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"set_attention_mask: expected a bool tensor (True = hidden), got {given}")
    square = mask.dim() in (2, 4) and mask.shape[-1] == mask.shape[-2] and (mask.dim() == 2 or mask.shape[1] == 1)
    if not square:
        raise ValueError(f"set_attention_mask: expected [S, S] or [1 or b, 1, S, S], got {tuple(mask.shape)}")
    STORE.custom, STORE.tiles = mask, None


def _checked_tile(tile: Tensor) -> Tensor:
    if not isinstance(tile, Tensor) or tile.dtype != torch.bool:
        given = tile.dtype if isinstance(tile, Tensor) else type(tile).__name__
        raise TypeError(f"set_attention_mask: expected tiles of dtype bool (True = hidden) or None, got {given}")
    if tile.dim() != 2 or tile.shape[0] != tile.shape[1]:
        raise ValueError(f"set_attention_mask: expected square tiles [S / R, S / R], got {tuple(tile.shape)}")
    return tile


def get_attention_mask(
    causal: bool = True, device: torch.device | str | None = None
) -> Tensor | tuple[Tensor | None, ...] | None:
    """The user's mask (or tiles), else the library's own causal template when the run is causal, else None."""
    if STORE.is_set:
        return STORE.custom if STORE.tiles is None else STORE.tiles
    if not causal:
        return None
    return STORE.generated if STORE.generated is not None else generate_attention_mask(True, device)


def generate_attention_mask(*arguments: Any, **named: Any) -> Tensor:
    """Build and keep the library's own causal mask; it never counts as a custom mask.

    Call as `generate_attention_mask(compress, device)` or, as older code does, `(args, compress, device)`.

    Args:
        compress: a [2048, 2048] template, enough for every length where a kernel takes one; else [S, S] with S and the
            band (`pre_tockens`, `next_tockens`) from `args` (`seq_length`), or [b, 1, S, S] without flash attention.
        device: where the mask lives; the platform's device by default.
    """
    args, compress, device = _arguments(*arguments, **named)
    if compress:
        mask = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu_(1)
        mask.is_compressed_causal_mask = True  # type: ignore[attr-defined]
    else:
        mask = _band(args, device)
    STORE.generated = mask
    return mask


def _arguments(*arguments: Any, **named: Any) -> tuple[Any, bool, torch.device]:
    args = named.get("args")
    if arguments and not isinstance(arguments[0], bool):
        args, arguments = arguments[0], arguments[1:]
    compress = arguments[0] if arguments else named.get("compress", True)
    device = arguments[1] if len(arguments) > 1 else named.get("device")
    if not compress and args is None:
        raise ValueError("generate_attention_mask: compress=False needs args with seq_length")
    if device is None:
        from mindspeed.platform import current

        device = current().device()
    return args, bool(compress), torch.device(device)


def _band(args: Any, device: torch.device) -> Tensor:
    """[S, S] with the future, and what lies outside the band, hidden."""
    length = args.seq_length
    hidden = torch.ones(length, length, dtype=torch.bool, device=device)
    past, future = getattr(args, "pre_tockens", None), getattr(args, "next_tockens", None) or 0
    hidden.triu_(1 + future)
    if past is not None and past < length:
        hidden |= torch.ones_like(hidden).tril_(-past - 1)
    if getattr(args, "use_flash_attn", True):
        return hidden
    return hidden.expand(args.micro_batch_size, 1, length, length)
