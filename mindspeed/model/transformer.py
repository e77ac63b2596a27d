"""Documented home of the attention-mask calls; the state is that of `flash_attention.generate_mask`."""

from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import (
    generate_attention_mask,
    get_attention_mask,
    set_attention_mask,
)

__all__ = ["generate_attention_mask", "get_attention_mask", "set_attention_mask"]
