"""Multi-latent attention on the local layer spec: head sizes of its core attention, and the gradient of its rotary keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform import Platform

_LATENT = "megatron.core.transformer.multi_latent_attention"


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


def rotary_keys_marked(original: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Mark what comes out of the projection of keys and values with the number of its last columns that all heads share."""

    def mark(projection: Any, inputs: Any, output: Any) -> None:
        output[0].rotary_columns = attention.config.qk_pos_emb_head_dim

    with attention.linear_kv_down_proj.register_forward_hook(mark):
        return original(attention, *args, **kwargs)


def gathered_for_all_heads(original: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Gather; the gradient of columns that the heads of all ranks use is summed over these ranks before it is cut."""
    gathered = original(tensor, *args, **kwargs)
    columns = getattr(tensor, "rotary_columns", 0)
    if not columns:
        return gathered
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    own, shared = gathered.split([gathered.shape[-1] - columns, columns], dim=-1)
    return torch.cat([own, copy_to_tensor_model_parallel_region(shared)], dim=-1)


def whole_gradients_left_alone(original: Callable[..., Any], model: Any, config: Any) -> Any:
    """Leave norms of compressed queries and keys alone: without sequence parallelism each rank has their whole gradient."""
    return None if config.multi_latent_attention and not config.sequence_parallel else original(model, config)


def patches(platform: Platform) -> Iterator[Patch]:
    """Repairs of constructor and backward; a checkpoint has no parameter of core attention, so none changes."""
    yield wrap(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        head_sizes_of_its_own,
        reason="multi-latent attention on the local spec passes k_channels and v_channels, which raised TypeError",
    )
    yield wrap(
        f"{_LATENT}:MLASelfAttention.get_query_key_value_tensors",
        rotary_keys_marked,
        reason="tells the rotary part of keys, which all heads share, from the rest",
    )
    yield wrap(
        f"{_LATENT}:gather_from_tensor_model_parallel_region",
        gathered_for_all_heads,
        reason="with TP > 1 rotary keys got the gradient of one rank's heads only",
    )
    yield wrap(
        "megatron.core.distributed.finalize_model_grads:_allreduce_layernorm_grads",
        whole_gradients_left_alone,
        reason="with TP > 1 and --qk-layernorm the gradient of the norm of compressed queries was multiplied by TP",
    )
