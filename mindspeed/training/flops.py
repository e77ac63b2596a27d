"""Floating-point operations of one step, counted as Megatron-LM counts them."""

from __future__ import annotations

import argparse


def expert_layers(args: argparse.Namespace) -> int:
    """Layers with experts, those of multi-token prediction included."""
    if args.num_experts is None:
        return 0
    frequency = args.moe_layer_freq
    pattern = frequency if isinstance(frequency, list) else [int(i % frequency == 0) for i in range(args.num_layers)]
    return sum(pattern) + pattern[-1] * (args.mtp_num_layers or 0)


def num_floating_point_operations(args: argparse.Namespace, batch_size: int) -> float:
    """Operations of forward and backward of `batch_size` sequences, without recomputation.

    A multiply-add is two operations, backward is twice forward, attention counts the causal half.
    """
    extra = args.mtp_num_layers or 0
    layers = args.num_layers + extra
    experts = expert_layers(args)
    gated = 1.5 if args.swiglu else 1.0
    shared = args.moe_shared_expert_intermediate_size or 0
    expert_width = (args.moe_ffn_hidden_size or args.ffn_hidden_size) * args.moe_router_topk if experts else 0
    mlp = 12 * args.hidden_size * gated * ((layers - experts) * args.ffn_hidden_size + experts * (expert_width + shared))
    attention = _latent_attention(args) if args.multi_latent_attention else _attention(args)
    prediction = 6 * extra * (3 * args.hidden_size + 2 * args.hidden_size**2)
    logits = 6 * args.hidden_size * args.padded_vocab_size * (extra + 1)
    return batch_size * args.seq_length * (mlp + layers * attention + prediction + logits)


def _attention(args: argparse.Namespace) -> float:
    """Per token and layer, with grouped keys and values."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    ratio = args.kv_channels * args.num_attention_heads / args.hidden_size
    parts = 1 + groups / args.num_attention_heads + args.seq_length / args.hidden_size / 2
    return 12 * args.hidden_size**2 * parts * ratio


def _latent_attention(args: argparse.Namespace) -> float:
    """Per token and layer, with compressed keys and values."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    head = args.qk_head_dim + args.qk_pos_emb_head_dim
    query = hidden * heads * head if args.q_lora_rank is None else args.q_lora_rank * (hidden + heads * head + 1)
    keys = args.kv_lora_rank * (hidden + heads * (args.qk_head_dim + args.v_head_dim) + 1) + hidden * args.qk_pos_emb_head_dim
    scores = args.seq_length * heads * (head + args.v_head_dim) / 2
    return 6 * (query + keys + heads * args.v_head_dim * hidden + scores)
