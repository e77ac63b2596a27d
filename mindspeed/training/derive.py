"""Values that follow from the flags given: sizes, types and switches, each change of a flag said once with its reason."""

from __future__ import annotations

import argparse
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


class Changes:
    """Writes derived values and remembers why a flag's value was changed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.log: list[str] = []

    def change(self, dest: str, value: Any, because: str) -> None:
        """Change a flag's value; recorded unless it has that value already."""
        old = getattr(self._args, dest)
        if old != value:
            self.log.append(f"--{dest.replace('_', '-')}: {old!r} -> {value!r} because {because}")
            setattr(self._args, dest, value)


def derive(args: argparse.Namespace) -> list[str]:
    """Fill in everything that the flags leave open.

    Args:
        args: parsed, unchecked arguments; changed in place. Values that depend on missing or impossible
            flags stay None: the checks name those flags.

    Returns:
        One line for each flag whose given or default value was changed.
    """
    changes = Changes(args)
    for step in (_sizes, _layout, _batches, _precision, _schedule, _recompute, _experts, _checkpoint):
        step(args, changes)
    _installed(args, changes)
    return changes.log


def _sizes(args: argparse.Namespace, changes: Changes) -> None:
    if args.use_rotary_position_embeddings:
        changes.change("position_embedding_type", "rope", "--use-rotary-position-embeddings is given")
    if args.hidden_size and args.num_attention_heads and args.kv_channels is None:
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if args.hidden_size and args.ffn_hidden_size is None:
        args.ffn_hidden_size = int(8 * args.hidden_size / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size
    if args.moe_ffn_hidden_size is None:
        args.moe_ffn_hidden_size = args.ffn_hidden_size
    if args.add_bias_linear:
        args.add_qkv_bias = True
    else:
        changes.change("bias_gelu_fusion", False, "--disable-bias-linear leaves no bias to fuse")
    if args.squared_relu:
        changes.change("bias_gelu_fusion", False, "--squared-relu is another activation")
    if args.position_embedding_type != "rope" or args.rotary_interleaved:
        args.apply_rope_fusion = False
    if args.apply_query_key_layer_scaling:
        args.attention_softmax_in_fp32 = True
    args.encoder_num_layers = args.num_layers
    args.encoder_seq_length = args.seq_length


def _layout(args: argparse.Namespace, changes: Changes) -> None:
    model_ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    args.data_parallel_size = max(1, args.world_size // model_ranks)
    args.transformer_pipeline_model_parallel_size = args.pipeline_model_parallel_size
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = args.tensor_model_parallel_size
    if args.tensor_model_parallel_size == 1:
        changes.change("sequence_parallel", False, "--tensor-model-parallel-size is 1")
    args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage and args.num_layers:
        per_stage = _counted_layers(args) // args.pipeline_model_parallel_size
        args.virtual_pipeline_model_parallel_size = per_stage // args.num_layers_per_virtual_pipeline_stage
    if args.virtual_pipeline_model_parallel_size is None:
        args.overlap_p2p_comm = False  # both belong to the interleaved schedule
        args.align_param_gather = False


def _counted_layers(args: argparse.Namespace) -> int:
    """Layers with the embedding and the loss where they are asked to count as one."""
    return args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split


def _batches(args: argparse.Namespace, changes: Changes) -> None:
    if args.global_batch_size is None and args.micro_batch_size:
        args.global_batch_size = args.micro_batch_size * args.data_parallel_size
    args.dataloader_type = args.dataloader_type or "single"
    if args.split is None and args.data_path:
        changes.change("split", "969, 30, 1", "it was not given")
    args.consumed_train_samples = 0
    args.skipped_train_samples = 0
    args.consumed_valid_samples = 0
    args.variable_seq_lengths = getattr(args, "variable_seq_lengths", False)


def _precision(args: argparse.Namespace, changes: Changes) -> None:
    args.params_dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    for dest in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        value = getattr(args, dest)
        setattr(args, dest, DTYPES.get(value, value))
    if args.fp16 and not args.loss_scale:
        changes.change("check_for_nan_in_loss_and_grad", False, "the dynamic loss scale of --fp16 reacts to NaN itself")
    if args.bf16 and args.grad_reduce_in_bf16:
        changes.change("accumulate_allreduce_grads_in_fp32", False, "--grad-reduce-in-bf16 is given")
    elif args.bf16 and args.main_grads_dtype == torch.float32:
        changes.change("accumulate_allreduce_grads_in_fp32", True, "--bf16 sums gradients in fp32")


def _schedule(args: argparse.Namespace, changes: Changes) -> None:
    if args.weight_decay_incr_style == "constant":
        if args.start_weight_decay is None and args.end_weight_decay is None:
            args.start_weight_decay = args.end_weight_decay = args.weight_decay


def _recompute(args: argparse.Namespace, changes: Changes) -> None:
    if args.recompute_activations:
        changes.change("recompute_granularity", "selective", "--recompute-activations is given")


def _experts(args: argparse.Namespace, changes: Changes) -> None:
    if args.num_experts == 0:
        args.num_experts = None


def _checkpoint(args: argparse.Namespace, changes: Changes) -> None:
    args.use_dist_ckpt = args.ckpt_format != "torch"


def _installed(args: argparse.Namespace, changes: Changes) -> None:
    """Step back from what no installed package provides; the results are the same."""
    from megatron.core.tensor_parallel import layers

    if args.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
        changes.change("gradient_accumulation_fusion", False, "no fused weight-gradient kernel is installed")
