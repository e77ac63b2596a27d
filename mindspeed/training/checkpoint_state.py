"""What a checkpoint holds, under Megatron-LM's keys, and the part of it that belongs to this rank."""

from __future__ import annotations

import argparse
import copy
import logging as python_logging
import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

from mindspeed.checkpoint import Team
from mindspeed.errors import CheckpointError
from mindspeed.training.session import get_args

_log = python_logging.getLogger(__name__)
_VERSION = 3.0
_PRIVATE = ("mindspeed", "rank", "local_rank")  # attributes of arguments that do not belong into a checkpoint


def team() -> Team:
    """All ranks of the job."""
    size = torch.distributed.get_world_size()

    def gather(item: Any) -> list[Any]:
        parts: list[Any] = [None] * size
        torch.distributed.all_gather_object(parts, item)
        return parts

    return Team(torch.distributed.get_rank(), size, gather)


def rank_directory() -> str:
    """Folder of this rank's model part: `mp_rank_TT[_PPP][_EEE]`."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return name


def unwrap_model(model: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Chunks without their data-parallel and 16-bit wrappers."""
    bare = []
    for chunk in model:
        while isinstance(chunk, DistributedDataParallel | Float16Module):
            chunk = chunk.module
        bare.append(chunk)
    return bare


def get_rng_state(ckpt_format: str) -> Any:
    """Random states of this rank; one entry per data-parallel rank with `--data-parallel-random-init`."""
    args = get_args()
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    states = [state]
    if args.data_parallel_random_init and parallel_state.get_data_parallel_world_size() > 1:
        states = [None] * parallel_state.get_data_parallel_world_size()  # type: ignore[list-item]
        torch.distributed.all_gather_object(states, state, group=parallel_state.get_data_parallel_group())
    if ckpt_format != "torch_dist":
        return states
    grid = (parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_world_size())
    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", states, grid, place, replica_id=replica)


def saved_args(args: argparse.Namespace) -> argparse.Namespace:
    """Arguments as they are written: plain data that unpickles where mindspeed is not installed."""
    plain = {name: value for name, value in vars(args).items() if name not in _PRIVATE}
    return argparse.Namespace(**copy.deepcopy(plain))


def generate_state_dict(
    args: argparse.Namespace,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    *,
    ckpt_format: str,
    rng_state: Any = None,
    rerun_state: Any = None,
    iteration: int | None = None,
    optimizer_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that is saved, or for `torch_dist` what is to be loaded in place; None leaves a part out."""
    sharded = ckpt_format == "torch_dist"
    state: dict[str, Any] = {"args": saved_args(args), "checkpoint_version": _VERSION}
    if iteration is not None:
        state["iteration"] = iteration
    for index, chunk in enumerate(model):
        if len(model) > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        key = "model" if len(model) == 1 else f"model{index}"
        state[key] = chunk.sharded_state_dict() if sharded else chunk.state_dict_for_save_checkpoint()
    if optimizer is not None and not optimizer.is_stub_optimizer:
        options = optimizer_options or {}
        _fill_untouched(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, **options) if sharded else optimizer.state_dict()
    if opt_param_scheduler is not None:
        state["opt_param_scheduler"] = opt_param_scheduler.state_dict()
    if rerun_state is not None:
        state["rerun_state_machine"] = rerun_state
    if rng_state is not None:
        state["rng_state"] = rng_state
    return state


def _fill_untouched(optimizer: Any) -> None:
    """Give an optimizer that has not stepped yet (fp16: every update skipped so far) its zero moments.

    A checkpoint without them could not be loaded: loading asks for the moments of every parameter.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is not None and not inner.state and getattr(part, "init_state_fn", None) is not None:
            part.init_state_fn(inner, part.config)


def layout_of(args: argparse.Namespace) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size: random states belong to one such layout."""
    return args.tensor_model_parallel_size, args.pipeline_model_parallel_size


def restore_rng(args: argparse.Namespace, state: dict[str, Any], directory: object) -> None:
    """Set the random states of this rank.

    Raises:
        CheckpointError: the checkpoint has none for this layout.
    """
    if "rng_state" not in state:
        raise CheckpointError(
            f"{directory} has no random states for this layout (saved for tensor x pipeline {layout_of(state['args'])}, "
            f"loading for {layout_of(args)}). Load it with --no-load-rng or --finetune."
        )
    ranks = state["rng_state"]
    saved = ranks[parallel_state.get_data_parallel_rank() if args.data_parallel_random_init else 0]
    random.setstate(saved["random_rng_state"])
    np.random.set_state(saved["np_rng_state"])
    torch.set_rng_state(saved["torch_rng_state"])
    if saved["cuda_rng_state"].numel() != torch.cuda.get_rng_state().numel():
        _log.warning("the checkpoint comes from another kind of device: its device random states are left out")
        return
    torch.cuda.set_rng_state(saved["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(saved["rng_tracker_states"])
