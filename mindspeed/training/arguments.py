"""Command line of the trainer: the flag table and features' flags in, a namespace with the host's names out."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mindspeed.errors import ConfigError, Problem
from mindspeed.training.flag_table import GROUPS

ArgumentsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

# Attributes that megatron-core or a reader of our checkpoints expects, and that no flag of the trainer can change.
FIXED: dict[str, Any] = {
    "encoder_tensor_model_parallel_size": 0,
    "encoder_pipeline_model_parallel_size": 0,
    "pipeline_model_parallel_split_rank": None,
    "decoder_seq_length": None,
    "use_custom_fsdp": False,
    "use_torch_fsdp2": False,
    "use_legacy_models": False,
    "is_hybrid_model": False,
    "heterogeneous_layers_config_path": None,
    "non_persistent_ckpt_type": None,
    "optimizer_cpu_offload": False,
    "fp8": None,
    "fp8_param_gather": False,
    "init_model_with_meta_device": False,
    "te_rng_tracker": False,
    "inference_rng_tracker": False,
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "tp_comm_overlap": False,
    "config_logger_dir": "",
    "yaml_cfg": None,
}


class _Refusing(argparse.ArgumentParser):
    """An argparse parser whose every complaint is a ConfigError instead of an exit."""

    def error(self, message: str) -> Any:
        raise ConfigError([Problem("command line", None, message, "see `mindspeed pretrain --help`")])


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: a switch has none, and None is no value to give."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.nargs == 0 or action.default is None else super()._get_help_string(action)


def build_parser(extra_args_provider: ArgumentsProvider | None = None) -> argparse.ArgumentParser:
    """Parser with the trainer's flags, the caller's own and those of all features."""
    from mindspeed.patching import activation, discovery

    parser = _Refusing(
        prog="mindspeed pretrain",
        usage="mindspeed pretrain [--nproc N] <training flags>",
        allow_abbrev=False,
        description="Pretrain a GPT on megatron-core.",
        formatter_class=_Help,
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    activation.add_flags(parser, discovery.all_features())
    return parser


def parse_args(extra_args_provider: ArgumentsProvider | None = None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; nothing is checked beyond the form of each value.

    The namespace also has `rank`, `world_size` and `local_rank` from the environment and `given_flags`, the
    destinations that the user named.

    Raises:
        ConfigError: unknown flags (with the nearest names, or saying that only a checkout has them) or
            values of the wrong form.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(extra_args_provider)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        raise ConfigError(_unknown(unknown, [option for action in parser._actions for option in action.option_strings]))
    args.given_flags = sorted(_given(parser, words))
    for name, value in FIXED.items():
        vars(args).setdefault(name, value)
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    return args


def _given(parser: argparse.ArgumentParser, words: list[str]) -> set[str]:
    """Destinations that appear on the command line, whatever their value."""
    named = {word.split("=", 1)[0] for word in words if word.startswith("--")}
    return {action.dest for action in parser._actions if named.intersection(action.option_strings)}


def _unknown(words: Iterable[str], known: Sequence[str]) -> list[Problem]:
    problems = []
    flags = [word for word in words if word.startswith("--")]
    if not flags:
        return [Problem(" ".join(words), None, "stands alone without a flag", "give it to a flag or remove it")]
    for word in flags:
        flag = word.split("=", 1)[0]
        if flag in host_only_flags():
            rule = "is a flag of Megatron-LM that the built-in trainer does not support"
            problems.append(
                Problem(flag, None, rule, "remove it, or use a Megatron-LM checkout with mindspeed.megatron_adaptor")
            )
        else:
            near = difflib.get_close_matches(flag, known, n=3)
            fix = f"did you mean {', '.join(near)}?" if near else "see `mindspeed pretrain --help`"
            problems.append(Problem(flag, None, "is not a known flag", fix))
    return problems


@functools.cache
def host_only_flags() -> frozenset[str]:
    """Flags that Megatron-LM has and the trainer lacks."""
    text = resources.files("mindspeed.training").joinpath("host_only_flags.json").read_text(encoding="utf-8")
    return frozenset(json.loads(text))


def core_transformer_config_from_args(args: argparse.Namespace, config_class: type | None = None) -> Any:
    """megatron-core's configuration of the model described by validated arguments.

    Returns:
        `TransformerConfig`, or `MLATransformerConfig` with `--multi-latent-attention`.
    """
    import torch
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = config_class or (MLATransformerConfig if args.multi_latent_attention else TransformerConfig)
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)}
    values |= {
        "persist_layer_norm": not args.no_persist_layer_norm,
        "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
        "layernorm_epsilon": args.norm_epsilon,
        "deallocate_pipeline_outputs": True,
        "pipeline_dtype": args.params_dtype,
        "batch_p2p_comm": not args.overlap_p2p_comm,
        "num_moe_experts": args.num_experts,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "bias_activation_fusion": args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion,
        "gated_linear_unit": args.swiglu,
    }
    if len(args.cp_comm_type) == 1:
        values["cp_comm_type"] = args.cp_comm_type[0]
    if args.swiglu:
        values["activation_func"] = torch.nn.functional.silu
    elif args.squared_relu:
        values["activation_func"] = _squared_relu
    if args.init_method_xavier_uniform:
        values["init_method"] = torch.nn.init.xavier_uniform_
    return kind(**values)


def check_config(args: argparse.Namespace) -> None:
    """Make the model's configuration once, so that what megatron-core refuses is told before anything is started.

    Raises:
        ConfigError: with megatron-core's words, or the condition itself where it has none.
    """
    try:
        core_transformer_config_from_args(args)
    except (AssertionError, ValueError, TypeError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split()) or f"megatron-core demands: {(frame.line or '').removeprefix('assert ')}"
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        rule = f"is refused by megatron-core: {words.rstrip('.')}"
        raise ConfigError(
            [Problem("model configuration", None, rule, f"change the flags that it speaks of (megatron-core's {where})")]
        ) from error


def _squared_relu(x: Any) -> Any:
    import torch

    return torch.relu(x).square()
