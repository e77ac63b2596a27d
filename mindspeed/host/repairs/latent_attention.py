"""Multi-latent attention on the local layer spec: its core attention is given head sizes that the host's does not know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform import Platform


def head_sizes_of_its_own(
    original: Callable[..., None],
    module: Any,
    config: Any,
    *args: Any,
    k_channels: int | None = None,
    v_channels: int | None = None,
    softmax_scale: float | None = None,
    **kwargs: Any,
) -> None:
    """Accept the sizes of key and value heads; the output is as wide as the values, the default scale follows the keys."""
    if softmax_scale is None and k_channels is not None:
        softmax_scale = 1.0 / math.sqrt(k_channels)
    original(module, config, *args, softmax_scale=softmax_scale, **kwargs)
    if v_channels is not None:
        module.hidden_size_per_partition = v_channels * module.num_attention_heads_per_partition


def patches(platform: Platform) -> Iterator[Patch]:
    """Repair of the constructor; a checkpoint has no parameter of core attention, so none changes."""
    yield wrap(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        head_sizes_of_its_own,
        reason="multi-latent attention on the local spec passes k_channels and v_channels, which raised TypeError",
    )
