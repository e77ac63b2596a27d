"""Mixture-of-experts code of megatron-core that is wrong or stops off CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform import Platform

_SEQ_DISPATCHER = "megatron.core.transformer.moe.legacy_a2a_token_dispatcher:MoEAlltoAllSEQTokenDispatcher"


def host_data(original: Callable[..., Any], tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Split sizes as numpy whatever device they come from; gloo takes no tensor of sizes."""
    moved = original(tensor, as_numpy, record_stream)
    if as_numpy and torch.is_tensor(moved):
        return moved.detach().cpu().numpy()
    return moved


def padded_counts_of_all_experts(original: Callable[..., Any], dispatcher: Any, routing_map: Tensor) -> Any:
    """With padding to capacity every expert has one entry; the host makes one per expert and TP rank."""
    tokens_per_expert = original(dispatcher, routing_map)
    if dispatcher.drop_and_pad:
        counts = dispatcher.num_global_tokens_per_local_expert_cpu
        dispatcher.num_global_tokens_per_local_expert_cpu = counts[: dispatcher.num_experts]
    return tokens_per_expert


def whole_sequence(original: Callable[..., Any], router: Any, logits: Tensor, bsz: int, seq_length: int) -> Any:
    """Sequence length of the logits as they are: `alltoall_seq` has gathered them over TP since it was read."""
    return original(router, logits, bsz, logits.shape[0] // bsz)


def patches(platform: Platform) -> Iterator[Patch]:
    """Repairs of the dispatchers and the router."""
    yield wrap(
        "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        host_data,
        reason="split sizes stayed a tensor for tensors that are not on CUDA",
    )
    yield wrap(
        f"{_SEQ_DISPATCHER}.preprocess",
        padded_counts_of_all_experts,
        reason="alltoall_seq with padding to capacity and TP > 1 listed every expert TP times",
    )
    yield wrap(
        "megatron.core.transformer.moe.router:TopKRouter.seq_aux_loss_load_balancing",
        whole_sequence,
        reason="alltoall_seq with seq_aux_loss and TP > 1 computed a wrong loss",
    )
