"""Rules over the trainer's flags. Every rule runs, every problem is reported, nothing is started before."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mindspeed.errors import DataError, Problem
from mindspeed.training.flag_table import every_flag
from mindspeed.training.tokenizers import build_tokenizer, padded_vocab_size
from mindspeed.training.validation_recompute import recompute_problems

MOCK_VOCABULARY = 4097  # megatron-core's mock documents hold ids up to 4096
_REQUIRED = {
    "num_layers": "the number of transformer layers",
    "hidden_size": "the width of the model",
    "num_attention_heads": "the number of query heads",
    "seq_length": "the tokens of one sample",
    "max_position_embeddings": "at least --seq-length",
    "micro_batch_size": "the samples of one forward pass",
    "lr": "the largest learning rate",
}


def out_of_range(args: argparse.Namespace) -> list[Problem]:
    """Values that a flag does not take, whatever the others say; asked before derived values are written."""
    return [problem for flag in every_flag() for problem in flag.problems(getattr(args, flag.dest))]


def has_ranks(args: argparse.Namespace) -> bool:
    """Whether every parallel size is one that derived values and rules can divide by."""
    kinds = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
    sizes = (getattr(args, f"{kind}_parallel_size") for kind in kinds)
    return all(size is None or size >= 1 for size in sizes)


def problems(args: argparse.Namespace, found: Iterable[Problem] = ()) -> list[Problem]:
    """Everything that is wrong with derived arguments (see `mindspeed.training.derive`), after what was `found`."""
    all_found = [*found, *(problem for rule in _FIRST for problem in rule(args))]
    if not all_found:  # the second set divides by values that the first has checked
        all_found += [problem for rule in _SECOND for problem in rule(args)]
    return all_found


def is_complete(args: argparse.Namespace) -> bool:
    """Whether nothing is missing that rules of features may count on."""
    return not list(_required(args))


def _required(args: argparse.Namespace) -> Iterator[Problem]:
    for dest, meaning in _REQUIRED.items():
        if getattr(args, dest) is None:
            yield Problem("--" + dest.replace("_", "-"), None, "is required", f"give {meaning}")
    if args.train_iters is None and args.train_samples is None:
        yield Problem("--train-iters", None, "is required", "give the number of steps, or --train-samples")


def _durations(args: argparse.Namespace) -> Iterator[Problem]:
    by_step = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
    by_sample = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")
    if args.train_iters is not None and args.train_samples is not None:
        yield Problem("--train-samples", args.train_samples, "cannot stand beside --train-iters", "keep one of them")
        return
    unit, wrong = ("steps", by_sample) if args.train_samples is None else ("samples", by_step)
    for dest in wrong:
        if getattr(args, dest):
            flag = "--" + dest.replace("_", "-")
            yield Problem(
                flag, getattr(args, dest), f"does not fit a run that is measured in {unit}", f"use the flag for {unit}"
            )
    if args.rampup_batch_size is not None and args.train_samples is None:
        yield Problem("--rampup-batch-size", args.rampup_batch_size, "needs --train-samples", "measure the run in samples")
    if args.lr_warmup_fraction is not None and (args.lr_warmup_iters or args.lr_warmup_samples):
        yield Problem(
            "--lr-warmup-fraction", args.lr_warmup_fraction, "cannot stand beside a fixed warm-up", "keep one of them"
        )
    if args.lr_decay_style == "WSD" and not (args.lr_wsd_decay_iters or args.lr_wsd_decay_samples):
        yield Problem("--lr-decay-style", "WSD", "needs the length of its last phase", "give --lr-wsd-decay-iters")
    if args.lr is not None and args.min_lr > args.lr:
        yield Problem("--min-lr", args.min_lr, f"must not exceed --lr {args.lr}", f"use at most {args.lr}")


def _warm_up(args: argparse.Namespace) -> Iterator[Problem]:
    by_sample = args.train_samples is not None
    flag, value = ("--lr-warmup-samples", args.lr_warmup_samples) if by_sample else ("--lr-warmup-iters", args.lr_warmup_iters)
    decay = (args.lr_decay_samples or args.train_samples) if by_sample else (args.lr_decay_iters or args.train_iters)
    if decay and args.lr_warmup_fraction is None and value >= decay:
        yield Problem(flag, value, f"must be shorter than the whole schedule of {decay}", f"use at most {decay - 1}")
    if args.lr_warmup_fraction is not None and args.lr_warmup_fraction >= 1:
        yield Problem("--lr-warmup-fraction", args.lr_warmup_fraction, "must be below 1", "use 0.1 for a tenth")


def _weight_decay(args: argparse.Namespace) -> Iterator[Problem]:
    given = (args.start_weight_decay, args.end_weight_decay)
    if args.weight_decay_incr_style == "constant":
        if any(value not in (None, args.weight_decay) for value in given):
            yield Problem(
                "--start-weight-decay", given, "needs a growing weight decay", "give --weight-decay-incr-style linear"
            )
    elif None in given:
        rule = "needs its first and last value"
        fix = "give --start-weight-decay and --end-weight-decay"
        yield Problem("--weight-decay-incr-style", args.weight_decay_incr_style, rule, fix)


def _precision(args: argparse.Namespace) -> Iterator[Problem]:
    if args.fp16 and args.bf16:
        yield Problem("--fp16", None, "cannot stand beside --bf16", "keep one of them")
    if args.fp32_residual_connection and not (args.fp16 or args.bf16):
        yield Problem(
            "--fp32-residual-connection", None, "needs --bf16 or --fp16", "remove it: fp32 runs keep it in fp32 anyway"
        )
    if args.fp16_lm_cross_entropy and not args.fp16:
        yield Problem("--fp16-lm-cross-entropy", None, "needs --fp16", "remove it or train in fp16")
    if args.moe_grouped_gemm and not args.bf16:
        yield Problem("--moe-grouped-gemm", None, "needs --bf16", "add --bf16 or remove it")


def _world(args: argparse.Namespace) -> Iterator[Problem]:
    sizes = {
        name: getattr(args, f"{name}_size") for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    }
    product = sizes["tensor_model_parallel"] * sizes["pipeline_model_parallel"] * sizes["context_parallel"]
    if args.world_size % product:
        tp, pp, cp = sizes.values()
        rule = f"tensor {tp} x pipeline {pp} x context {cp} = {product} ranks do not divide it"
        yield Problem("world size", args.world_size, rule, f"start a multiple of {product} processes (--nproc {product})")
        return  # experts are laid out over the same ranks: their sizes would be blamed for the same mistake
    expert = args.expert_tensor_parallel_size * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % expert:
        rule = f"expert tensor x expert x pipeline = {expert} ranks do not divide the {args.world_size} processes"
        yield Problem(
            "--expert-model-parallel-size", args.expert_model_parallel_size, rule, "choose sizes whose product divides them"
        )


def _model_shape(args: argparse.Namespace) -> Iterator[Problem]:
    tp = args.tensor_model_parallel_size
    if args.kv_channels * args.num_attention_heads != args.hidden_size and "kv_channels" not in args.given_flags:
        rule = f"{args.num_attention_heads} heads do not divide it"
        yield Problem(
            "--hidden-size", args.hidden_size, rule, "choose a multiple of --num-attention-heads, or give --kv-channels"
        )
    for flag, value in (
        ("--num-attention-heads", args.num_attention_heads),
        ("--ffn-hidden-size", args.ffn_hidden_size),
        ("--hidden-size", args.hidden_size),
    ):
        if value % tp:
            yield Problem(
                flag, value, f"must be a multiple of --tensor-model-parallel-size {tp}", f"use {value - value % tp + tp}"
            )
    if args.group_query_attention:
        groups = args.num_query_groups
        if args.num_attention_heads % groups or (groups % tp and tp % groups):
            rule = f"must divide the {args.num_attention_heads} heads and be a multiple of tensor-parallel size {tp}"
            yield Problem("--num-query-groups", groups, rule, "choose another number of groups")
    if args.max_position_embeddings < args.seq_length:
        rule = f"must not be smaller than --seq-length {args.seq_length}"
        yield Problem("--max-position-embeddings", args.max_position_embeddings, rule, f"use at least {args.seq_length}")


def _sequence(args: argparse.Namespace) -> Iterator[Problem]:
    if args.sequence_parallel and args.seq_length % args.tensor_model_parallel_size:
        tp = args.tensor_model_parallel_size
        yield Problem(
            "--seq-length", args.seq_length, f"--sequence-parallel splits it over {tp} ranks", f"use a multiple of {tp}"
        )
    unit = 2 * args.context_parallel_size
    if args.context_parallel_size > 1 and args.seq_length % unit:
        yield Problem(
            "--seq-length",
            args.seq_length,
            f"must be a multiple of 2 x context-parallel size = {unit}",
            f"use a multiple of {unit}",
        )
    if args.tensor_model_parallel_size > 1 and args.expert_model_parallel_size > 1 and not args.sequence_parallel:
        yield Problem(
            "--expert-model-parallel-size",
            args.expert_model_parallel_size,
            "with tensor parallelism needs --sequence-parallel",
            "add --sequence-parallel",
        )


def _batches(args: argparse.Namespace) -> Iterator[Problem]:
    unit = args.micro_batch_size * args.data_parallel_size
    size = args.global_batch_size
    if size % unit and args.rampup_batch_size is None and not args.decrease_batch_size_if_needed:
        rule = f"must be a multiple of micro batch {args.micro_batch_size} x {args.data_parallel_size} data-parallel ranks = {unit}"
        yield Problem("--global-batch-size", size, rule, f"use {max(unit, size - size % unit)} or {size - size % unit + unit}")
    if args.rampup_batch_size is not None and len(args.rampup_batch_size) != 3:
        rule = "takes start size, increment and samples"
        yield Problem("--rampup-batch-size", " ".join(args.rampup_batch_size), rule, "give three numbers")
    if args.virtual_pipeline_model_parallel_size and (size // unit) % args.pipeline_model_parallel_size:
        rule = f"gives {size // unit} micro batches, which the interleaved schedule needs in multiples of the {args.pipeline_model_parallel_size} stages"
        yield Problem("--global-batch-size", size, rule, f"use a multiple of {unit * args.pipeline_model_parallel_size}")


def _pipeline(args: argparse.Namespace) -> Iterator[Problem]:
    stages = args.pipeline_model_parallel_size
    chunks = args.virtual_pipeline_model_parallel_size
    uneven = args.decoder_first_pipeline_num_layers is not None or args.decoder_last_pipeline_num_layers is not None
    counted = args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if not uneven and counted % stages:
        yield Problem(
            "--num-layers",
            args.num_layers,
            f"must fill {stages} pipeline stages evenly",
            f"use {counted - counted % stages + stages}",
        )
    both = args.num_layers_per_virtual_pipeline_stage and args.num_virtual_stages_per_pipeline_rank
    if both:
        yield Problem(
            "--num-virtual-stages-per-pipeline-rank",
            chunks,
            "says the same as --num-layers-per-virtual-pipeline-stage",
            "keep one of them",
        )
        return
    if args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank:
        flag = "--num-layers-per-virtual-pipeline-stage"
        flag = flag if args.num_layers_per_virtual_pipeline_stage else "--num-virtual-stages-per-pipeline-rank"
        least = 2 if args.overlap_p2p_comm else 3
        if stages < least:
            yield Problem(
                flag,
                getattr(args, flag[2:].replace("-", "_")),
                f"the interleaved schedule needs {least} or more pipeline stages",
                "raise --pipeline-model-parallel-size or remove it",
            )
        elif not uneven and counted % (stages * max(chunks or 0, 1)) or not chunks:
            yield Problem(
                flag,
                getattr(args, flag[2:].replace("-", "_")),
                f"{args.num_layers} layers do not fill {stages} stages of equal chunks",
                "choose a number that divides the layers of a stage",
            )
    elif args.overlap_param_gather_with_optimizer_step:
        yield Problem("--overlap-param-gather-with-optimizer-step", None, "needs the interleaved schedule", "remove it")


def _data_parallel(args: argparse.Namespace) -> Iterator[Problem]:
    if args.overlap_param_gather and not args.use_distributed_optimizer:
        yield Problem("--overlap-param-gather", None, "needs --use-distributed-optimizer", "add it")
    if args.overlap_param_gather and not args.overlap_grad_reduce:
        yield Problem("--overlap-param-gather", None, "needs --overlap-grad-reduce", "add it")
    if args.use_precision_aware_optimizer and not args.use_distributed_optimizer:
        yield Problem("--use-precision-aware-optimizer", None, "needs --use-distributed-optimizer", "add it")
    if args.ddp_num_buckets and args.ddp_bucket_size:
        yield Problem("--ddp-num-buckets", args.ddp_num_buckets, "cannot stand beside --ddp-bucket-size", "keep one of them")
    if not args.enable_gloo_process_groups and args.use_distributed_optimizer and args.ckpt_format == "torch":
        yield Problem(
            "--disable-gloo-process-groups",
            None,
            "the torch format gathers optimizer state over gloo",
            "use --ckpt-format torch_dist",
        )


def _experts(args: argparse.Namespace) -> Iterator[Problem]:
    size = args.expert_model_parallel_size
    if size > 1 and args.num_experts is None:
        yield Problem("--expert-model-parallel-size", size, "needs --num-experts", "give the number of experts")
    elif size > 1 and args.num_experts % size:
        yield Problem(
            "--num-experts",
            args.num_experts,
            f"must be a multiple of --expert-model-parallel-size {size}",
            f"use a multiple of {size}",
        )
    if size > 1 and args.fp16:
        yield Problem("--expert-model-parallel-size", size, "does not work with --fp16", "use --bf16")
    if args.num_experts and args.add_bias_linear:
        yield Problem("--num-experts", args.num_experts, "experts have no bias", "add --disable-bias-linear")
    if args.num_experts and args.moe_router_topk > args.num_experts:
        rule, fix = f"there are {args.num_experts} experts", f"use at most {args.num_experts}"
        yield Problem("--moe-router-topk", args.moe_router_topk, rule, fix)
    if args.num_experts and isinstance(args.moe_layer_freq, list) and len(args.moe_layer_freq) != args.num_layers:
        rule = f"describes {len(args.moe_layer_freq)} of {args.num_layers} layers"
        yield Problem("--moe-layer-freq", args.moe_layer_freq, rule, "give one entry per layer")


def _sources(args: argparse.Namespace) -> Iterator[Problem]:
    split = any((args.train_data_path, args.valid_data_path, args.test_data_path))
    sources = [
        bool(args.mock_data),
        bool(args.data_path),
        split,
        bool(args.data_args_path),
        bool(args.per_split_data_args_path),
    ]
    if sum(sources) == 0:
        yield Problem(
            "--data-path", None, "is required", "name .bin/.idx files (see `mindspeed preprocess`), or give --mock-data"
        )
    if sum(sources) > 1:
        yield Problem(
            "--data-path",
            None,
            "there is more than one source of data",
            "keep one of --data-path, --train-data-path..., --mock-data",
        )
    for flag, path in (
        ("--data-args-path", args.data_args_path),
        ("--per-split-data-args-path", args.per_split_data_args_path),
    ):
        if path and not Path(path).is_file():
            yield Problem(flag, path, "there is no such file", "check the path")
    if args.dataloader_type == "external":
        yield Problem("--dataloader-type", "external", "the trainer makes its own loaders", "use single or cyclic")
    if args.data_cache_path and Path(args.data_cache_path).exists() and not Path(args.data_cache_path).is_dir():
        yield Problem("--data-cache-path", args.data_cache_path, "is not a folder", "name a folder")


def _tokenizer(args: argparse.Namespace) -> Iterator[Problem]:
    if args.tokenizer_type is None:
        yield Problem(
            "--tokenizer-type", None, "is required", "use ByteTokenizer for text, NullTokenizer for numbers and mock data"
        )
        return
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        yield Problem("--vocab-size", None, "NullTokenizer needs it", "give the number of tokens")
        return
    try:
        tokenizer = build_tokenizer(args)
    except DataError as error:
        yield Problem("--tokenizer-type", args.tokenizer_type, str(error), "check the tokenizer's files")
        return
    args.padded_vocab_size = padded_vocab_size(
        tokenizer.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    yield from _end_of_document(args, tokenizer)
    if args.mock_data and args.tokenizer_type != "NullTokenizer" and tokenizer.vocab_size < MOCK_VOCABULARY:
        rule = f"mock documents hold ids up to {MOCK_VOCABULARY - 1}, this tokenizer has {tokenizer.vocab_size}"
        yield Problem("--mock-data", None, rule, f"use --tokenizer-type NullTokenizer --vocab-size {MOCK_VOCABULARY} or more")


def _end_of_document(args: argparse.Namespace, tokenizer: Any) -> Iterator[Problem]:
    """Flags about documents need a token that ends them; only a SentencePiece model can lack one here."""
    for dest in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"):
        if getattr(args, dest) and tokenizer.eod < 0:
            rule = f"needs a token that ends a document, which {args.tokenizer_model} has not"
            yield Problem("--" + dest.replace("_", "-"), None, rule, "choose another tokenizer or remove the flag")


def _checkpoint(args: argparse.Namespace) -> Iterator[Problem]:
    if args.save is not None and args.save_interval is None:
        yield Problem("--save", args.save, "needs --save-interval", "give the steps between checkpoints")
    if args.save is not None and Path(args.save).exists() and not Path(args.save).is_dir():
        yield Problem("--save", args.save, "is not a folder", "name a folder")
    if args.async_save and args.ckpt_format == "torch":
        yield Problem("--async-save", None, "needs --ckpt-format torch_dist", "change the format or remove it")
    if args.rerun_mode != "disabled" and args.dataloader_type == "external":
        yield Problem("--rerun-mode", args.rerun_mode, "needs the trainer's own data loaders", "remove it")


def _profile(args: argparse.Namespace) -> Iterator[Problem]:
    if args.profile and args.profile_step_end <= args.profile_step_start:
        rule = f"must come after --profile-step-start {args.profile_step_start}"
        yield Problem("--profile-step-end", args.profile_step_end, rule, f"use {args.profile_step_start + 1} or more")


def _positions(args: argparse.Namespace) -> Iterator[Problem]:
    kind = args.position_embedding_type
    if kind in ("relative", "mrope"):
        yield Problem(
            "--position-embedding-type",
            kind,
            "is not a position embedding of the trainer's GPT",
            "use rope, learned_absolute or none",
        )
    if not args.add_position_embedding:
        yield Problem("--no-position-embedding", None, "is deprecated", "use --position-embedding-type none")
    if args.mtp_num_layers and kind not in ("rope", "none"):
        yield Problem(
            "--mtp-num-layers",
            args.mtp_num_layers,
            f"does not work with {kind} positions",
            "use --position-embedding-type rope",
        )
    if args.swiglu and args.squared_relu:
        yield Problem("--swiglu", None, "cannot stand beside --squared-relu", "keep one of them")


Rule = Callable[[argparse.Namespace], Iterator[Problem]]
_FIRST: tuple[Rule, ...] = (
    _required, _durations, _warm_up, _weight_decay, _precision, _world, _data_parallel, recompute_problems, _sources, _tokenizer, _checkpoint, _positions, _profile,
)  # fmt: skip
_SECOND: tuple[Rule, ...] = (_model_shape, _sequence, _batches, _pipeline, _experts)
