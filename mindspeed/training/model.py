"""Model, optimizer and schedule: a GPT of megatron-core wrapped for data parallelism."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from mindspeed.errors import DataError
from mindspeed.training import arguments, checkpointing
from mindspeed.training.session import current, get_args, get_timers

ModelProvider = Callable[..., torch.nn.Module]


def model_provider(pre_process: bool = True, post_process: bool = True) -> torch.nn.Module:
    """Build this rank's part of the GPT that the arguments describe.

    Args:
        pre_process: the part begins with the embedding.
        post_process: the part ends with the output layer.
    """
    args = get_args()
    config = arguments.core_transformer_config_from_args(args)
    layer_spec = _layer_spec(args, config)
    fused = args.transformer_impl == "transformer_engine"
    mtp_spec = None
    if args.mtp_num_layers is not None:
        mtp_spec = specs.get_gpt_mtp_block_spec(config, layer_spec, use_transformer_engine=fused)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=mtp_spec,
    )


def _layer_spec(args: argparse.Namespace, config: Any) -> Any:
    if args.spec is not None and args.spec != ["local"]:
        module, name = args.spec
        found = getattr(importlib.import_module(module), name)
        return found() if callable(found) else found
    fused = args.transformer_impl == "transformer_engine" and args.spec is None
    if args.num_experts:
        return specs.get_gpt_decoder_block_spec(config, use_transformer_engine=fused, normalization=args.normalization)
    shape = {
        "num_experts": args.num_experts,
        "moe_grouped_gemm": args.moe_grouped_gemm,
        "qk_layernorm": args.qk_layernorm,
        "multi_latent_attention": args.multi_latent_attention,
        "moe_use_legacy_grouped_gemm": args.moe_use_legacy_grouped_gemm,
    }
    if fused:
        return specs.get_gpt_layer_with_transformer_engine_spec(**shape)
    return specs.get_gpt_layer_local_spec(**shape, normalization=args.normalization)


def provider_from_text(text: str | None) -> ModelProvider:
    """The function named by `--model-provider file.py:function`, or the GPT of this module.

    Raises:
        DataError: the file or the function does not exist.
    """
    if text is None:
        return model_provider
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise DataError(f"--model-provider {text}: there is no file {path!r}. Give file.py:function.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    if not callable(getattr(module, name, None)):
        raise DataError(f"--model-provider {text}: {path} has no function {name!r}")
    return getattr(module, name)


def get_model(
    model_provider_func: ModelProvider, model_type: ModelType = ModelType.encoder_or_decoder, wrap_with_ddp: bool = True
) -> list[torch.nn.Module]:
    """Build this rank's model chunks, move them to the device and wrap them for data parallelism."""
    args = get_args()
    args.model_type = model_type
    chunks = _build_chunks(args, model_provider_func, model_type)
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    count = sum(parameter.nelement() for chunk in chunks for parameter in chunk.parameters())
    if parallel_state.get_data_parallel_rank() == 0:
        position = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
        print(f" > number of parameters on (tensor, pipeline) model parallel rank {position}: {count}", flush=True)
    current().events.fire("model_built", model=chunks)
    for chunk in chunks:
        chunk.cuda(torch.cuda.current_device())
    if args.fp16 or args.bf16:
        config = get_model_config(chunks[0])
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    return _data_parallel(args, chunks, count) if wrap_with_ddp else chunks


def _build_chunks(args: argparse.Namespace, provider: ModelProvider, model_type: ModelType) -> list[torch.nn.Module]:
    chunks = []
    virtual = args.virtual_pipeline_model_parallel_size
    interleaved = virtual is not None and parallel_state.get_pipeline_model_parallel_world_size() > 1
    for index in range(virtual if interleaved else 1):
        if interleaved:
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        chunk = provider(
            pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage()
        )
        chunk.model_type = model_type
        chunks.append(chunk)
    return chunks


def _data_parallel(args: argparse.Namespace, chunks: list[torch.nn.Module], parameters: int) -> list[torch.nn.Module]:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(DistributedDataParallelConfig) if hasattr(args, f.name)}
    given |= {
        "grad_reduce_in_fp32": args.accumulate_allreduce_grads_in_fp32,
        "check_for_nan_in_grad": args.check_for_nan_in_loss_and_grad,
        "check_for_large_grads": args.check_for_large_grads,
        "pad_buckets_for_high_nccl_busbw": args.ddp_pad_buckets_for_high_nccl_busbw,
        "average_in_collective": args.ddp_average_in_collective,
        "bucket_size": _bucket_size(args, parameters),
    }
    config = DistributedDataParallelConfig(**given)
    wrapped: list[torch.nn.Module] = [
        DistributedDataParallel(
            config=get_model_config(chunks[0]),
            ddp_config=config,
            module=chunk,
            # later chunks reduce while earlier ones still compute, so one bucket is enough for them
            disable_bucketing=index > 0 or args.overlap_param_gather_with_optimizer_step,
        )
        for index, chunk in enumerate(chunks)
    ]
    if args.data_parallel_random_init:
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped


def _bucket_size(args: argparse.Namespace, parameters: int) -> int | None:
    """Elements per gradient bucket; None is one bucket for all."""
    if not args.overlap_grad_reduce:
        return None
    if args.ddp_num_buckets is not None:
        return parameters // args.ddp_num_buckets
    if args.ddp_bucket_size is not None:
        return int(args.ddp_bucket_size)
    return max(40_000_000, 1_000_000 * parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def get_optimizer_param_scheduler(optimizer: Any) -> OptimizerParamScheduler:
    """Schedule of learning rate and weight decay, counted in samples."""
    args = get_args()
    _count_steps(args)
    if args.train_samples is None:
        unit = args.global_batch_size
        args.lr_decay_iters = args.lr_decay_iters or args.train_iters
        decay, growth, warmup = args.lr_decay_iters * unit, args.train_iters * unit, args.lr_warmup_iters * unit
        last = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * unit
    else:
        args.lr_decay_samples = args.lr_decay_samples or args.train_samples
        decay, growth, warmup = args.lr_decay_samples, args.train_samples, args.lr_warmup_samples
        last = args.lr_wsd_decay_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=growth,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=last,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def _count_steps(args: argparse.Namespace) -> None:
    """Set `train_iters` of a run that is measured in samples; the last partial batch is dropped."""
    if args.train_samples is None or args.train_iters:
        return
    consumed = steps = 0
    if args.rampup_batch_size is not None:
        while consumed <= int(args.rampup_batch_size[2]) and consumed <= args.train_samples:
            update_num_microbatches(consumed, consistency_check=False)
            consumed += get_current_global_batch_size()
            steps += 1
        update_num_microbatches(0, consistency_check=False)
    args.train_iters = steps + max(0, args.train_samples - consumed) // args.global_batch_size


def setup_model_and_optimizer(
    model_provider_func: ModelProvider,
    model_type: ModelType = ModelType.encoder_or_decoder,
    no_wd_decay_cond: Callable[..., bool] | None = None,
    scale_lr_cond: Callable[..., bool] | None = None,
    lr_mult: float = 1.0,
    checkpointing_context: dict[str, Any] | None = None,
) -> tuple[list[torch.nn.Module], Any, OptimizerParamScheduler]:
    """Build model, optimizer and schedule, and load the checkpoint that `--load` names.

    Sets `args.iteration` and `args.num_floating_point_operations_so_far`.
    """
    args = get_args()
    model = get_model(model_provider_func, model_type)
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(OptimizerConfig) if hasattr(args, f.name)}
    config = OptimizerConfig(**values)
    config.timers = get_timers()
    optimizer = get_megatron_optimizer(
        config, model, no_wd_decay_cond, scale_lr_cond, lr_mult, use_gloo_process_groups=args.enable_gloo_process_groups
    )
    current().events.fire("optimizer_built", optimizer=optimizer, model=model)
    scheduler = get_optimizer_param_scheduler(optimizer)
    args.iteration, args.num_floating_point_operations_so_far = 0, 0
    if args.load is not None or args.pretrained_checkpoint is not None:
        args.iteration, args.num_floating_point_operations_so_far = checkpointing.load_checkpoint(
            model, optimizer, scheduler, checkpointing_context=checkpointing_context
        )
    return model, optimizer, scheduler
