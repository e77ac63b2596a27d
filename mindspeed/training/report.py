"""Printing on one rank, and figures that need every rank: norms, maxima, agreement."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from mindspeed.training.session import get_args


def print_rank_0(message: str) -> None:
    """Print on rank 0, or anywhere before ranks exist."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(message, flush=True)


def is_last_rank() -> bool:
    """Whether this is the rank that logs."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def print_rank_last(message: str) -> None:
    """Print on the last rank, which knows the loss."""
    if is_last_rank():
        print(message, flush=True)


def reduce_max_stat_across_model_parallel_group(stat: float | None) -> float | None:
    """Largest value over the model-parallel ranks; None counts as absent. Values are not negative."""
    value = torch.tensor([-1.0 if stat is None else stat], dtype=torch.float32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=parallel_state.get_model_parallel_group())
    return None if value.item() == -1.0 else value.item()


def logical_and_across_model_parallel_group(value: bool) -> bool:
    """True when it is true on all model-parallel ranks."""
    flag = torch.tensor([int(value)], dtype=torch.int, device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
    return bool(flag.item())


def any_rank(value: bool) -> bool:
    """True when it is true on any rank of the job."""
    flag = torch.tensor([int(value)], dtype=torch.int, device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def calc_params_l2_norm(model: list[torch.nn.Module]) -> float:
    """Norm of all parameters of the job, each counted once; fp32 main copies where they exist."""
    dense: list[torch.Tensor] = []
    sharded: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
        if not param_is_not_tensor_parallel_duplicate(parameter):
            continue
        if not getattr(parameter, "allreduce", True):
            experts.append(parameter)
        elif param_is_not_shared(parameter):
            main = getattr(parameter, "main_param", parameter)
            if getattr(parameter, "main_param_sharded", False):
                sharded += [] if main is None else [main]
            else:
                dense.append(main)
    total = _square(dense) + _sum(_square(sharded), parallel_state.get_data_parallel_group())
    total = _sum(total, parallel_state.get_model_parallel_group())
    total = total + _sum(_square(experts), parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    return float(total.sqrt())


def _square(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Square of the norm over several parameters."""
    norms = [torch.linalg.vector_norm(parameter.detach().float()) for parameter in parameters]
    if not norms:
        return torch.zeros((), device=torch.cuda.current_device())
    return torch.linalg.vector_norm(torch.stack(norms)).square()


def _sum(value: torch.Tensor, group: Any) -> torch.Tensor:
    torch.distributed.all_reduce(value, group=group)
    return value


def report_memory(name: str) -> None:
    """Print device memory of each rank that has its own model part."""
    if parallel_state.get_data_parallel_rank() != 0:
        return
    mebi = 1024.0 * 1024.0
    device = torch.cuda
    print(
        f"[Rank {torch.distributed.get_rank()}] {name} memory (MB)"
        f" | allocated: {device.memory_allocated() / mebi:.2f}"
        f" | max allocated: {device.max_memory_allocated() / mebi:.2f}"
        f" | reserved: {device.memory_reserved() / mebi:.2f}"
        f" | max reserved: {device.max_memory_reserved() / mebi:.2f}",
        flush=True,
    )


def append_to_progress_log(message: str) -> None:
    """Append a line with time, job and size of the world to `progress.txt` in the checkpoint folder."""
    args = get_args()
    if args.save is None or torch.distributed.get_rank() != 0:
        return
    Path(args.save).mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    with open(Path(args.save) / "progress.txt", "a", encoding="utf-8") as file:
        file.write(f"{now}\tJob ID: {os.environ.get('SLURM_JOB_ID', '')}\t# GPUs: {args.world_size}\t{message}\n")


def timestamp() -> str:
    """Local time as log lines show it."""
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def item(value: Any) -> float:
    """A number as a float, whether it is a tensor or not."""
    return float(value.item() if isinstance(value, torch.Tensor) else value)
