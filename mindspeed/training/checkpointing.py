"""Checkpoints in Megatron-LM's layout and with its keys, written whole or not at all (see `mindspeed.checkpoint`).

<save>/iter_0000010/mp_rank_00/model_optim_rng.pt        --ckpt-format torch, one file per model-parallel rank
<save>/iter_0000010/{*.distcp, common.pt, .metadata}     --ckpt-format torch_dist, loads in any layout
<save>/latest_checkpointed_iteration.txt
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine

from mindspeed.checkpoint import Found, Save, check_fits, find_checkpoint, seal
from mindspeed.errors import CheckpointError
from mindspeed.training.checkpoint_state import (
    generate_state_dict,
    get_rng_state,
    layout_of,
    rank_directory,
    restore_rng,
    team,
    unwrap_model,
)
from mindspeed.training.report import print_rank_0
from mindspeed.training.session import current, get_args


def save_checkpoint(
    iteration: int,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict[str, Any] | None = None,
    train_data_iterator: Any = None,
    preprocess_common_state_dict_fn: Callable[[Any], Any] | None = None,
    **unused: Any,
) -> None:
    """Write a checkpoint of this iteration below `--save`; collective.

    Raises:
        CheckpointError: it could not be written (on all ranks; earlier checkpoints are intact), unless
            `--ckpt-save-failure continue`.
    """
    args = get_args()
    print_rank_0(f"saving checkpoint at iteration {iteration:7d} to {args.save} in {args.ckpt_format} format")
    sharding = "fully_sharded_model_space" if args.ckpt_fully_parallel_save else "dp_zero_gather_scatter"
    options = {"sharding_type": sharding} if args.use_distributed_optimizer else {}
    state = generate_state_dict(
        args,
        unwrap_model(model),
        None if args.no_save_optim else optimizer,
        None if args.no_save_optim else opt_param_scheduler,
        ckpt_format=args.ckpt_format,
        rng_state=None if args.no_save_rng else get_rng_state(args.ckpt_format),
        rerun_state=get_rerun_state_machine().state_dict(train_data_iterator, args.ckpt_format),
        iteration=iteration,
        optimizer_options=options,
    )
    state["num_floating_point_operations_so_far"] = num_floating_point_operations_so_far
    current().events.fire("checkpoint_save", iteration=iteration, state=state)
    if args.async_save:
        _save_in_background(state, iteration, checkpointing_context)
        return
    with _transaction(iteration, keep_training=args.ckpt_save_failure == "continue") as save:
        if args.ckpt_format == "torch_dist":
            strategy, checked = _save_strategy(checkpointing_context)
            dist_checkpointing.save(
                state,
                str(save.staged),
                strategy,
                validate_access_integrity=checked,
                preprocess_common_before_consistancy_check=preprocess_common_state_dict_fn or _comparable,
            )
        else:
            _write_torch(save, state, optimizer)
    if save.failure is None:
        _announce(iteration)


def _transaction(iteration: int, *, keep_training: bool = False) -> Save:
    args = get_args()
    world = {
        "world_size": args.world_size,
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "expert": args.expert_model_parallel_size,
    }
    return Save(args.save, iteration, team=team(), format=args.ckpt_format, world=world, keep_training=keep_training)


def _announce(iteration: int) -> None:
    args = get_args()
    directory = Path(args.save) / f"iter_{iteration:07d}"
    print_rank_0(f"  successfully saved checkpoint from iteration {iteration:7d} to {args.save} {_place()}")
    current().events.fire("checkpoint_saved", iteration=iteration, directory=directory)


def _place() -> str:
    state = parallel_state
    tensor = f"t {state.get_tensor_model_parallel_rank() + 1}/{state.get_tensor_model_parallel_world_size()}"
    return f"[ {tensor}, p {state.get_pipeline_model_parallel_rank() + 1}/{state.get_pipeline_model_parallel_world_size()} ]"


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """What must be equal on all ranks, in a form that can be compared."""
    return {**state, "args": vars(state["args"])}


def _write_torch(save: Save, state: dict[str, Any], optimizer: Any) -> None:
    """One file per model-parallel rank, and one for the optimizer of each data-parallel group."""
    args = get_args()
    folder = save.staged / rank_directory()
    folder.mkdir(parents=True, exist_ok=True)
    if args.use_distributed_optimizer and not args.no_save_optim and optimizer is not None and not optimizer.is_stub_optimizer:
        path = folder / "distrib_optim.pt"
        if parallel_state.get_data_parallel_rank() == 0:
            save.wrote(path)
        optimizer.save_parameter_state(str(path))  # gathers over the data-parallel group, whose first rank writes
    if parallel_state.get_expert_data_parallel_rank() == 0:
        torch.save(state, save.wrote(folder / "model_optim_rng.pt"))


def _save_strategy(context: dict[str, Any] | None) -> tuple[Any, bool]:
    """The strategy of the first save is kept; returns it and whether sharding is to be checked."""
    args = get_args()
    if context is not None and "save_strategy" in context:
        return context["save_strategy"], not args.ckpt_assume_constant_structure
    strategy = get_default_save_sharded_strategy("torch_dist")
    if args.ckpt_assume_constant_structure:
        strategy.use_cached_ckpt_structure = True
    if args.ckpt_fully_parallel_save:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group, args.ckpt_assume_constant_structure)
    if context is not None:
        context["save_strategy"] = strategy
    return strategy, True


def _save_in_background(state: dict[str, Any], iteration: int, context: dict[str, Any] | None) -> None:
    session = current()
    if session.saves is None:
        session.saves = AsyncCallsQueue()
    save = _transaction(iteration)
    save.begin()
    strategy, checked = _save_strategy(context)
    request = dist_checkpointing.save(
        state,
        str(save.staged),
        strategy,
        validate_access_integrity=checked,
        async_sharded_save=True,
        preprocess_common_before_consistancy_check=_comparable,
    )
    # not as further arguments: the queue replaces the second one by what the preload function returns
    sealed = functools.partial(_write_and_seal, request.async_fn, str(save.staged), torch.distributed.get_rank())
    request = request._replace(async_fn=sealed)
    request.add_finalize_fn(lambda: (save.commit(sealed=True), _announce(iteration)))
    session.saves.schedule_async_request(request)
    print_rank_0(f"  scheduled an async checkpoint save at iteration {iteration:7d} to {get_args().save}")


def _write_and_seal(write: Callable[..., Any], staged: str, rank: int, *arguments: Any, **options: Any) -> None:
    """Runs in the writer process of an asynchronous save."""
    if write is not None:
        write(*arguments, **options)
    seal(staged, rank)


def maybe_finalize_async_save(blocking: bool = False, terminate: bool = False) -> None:
    """Complete background saves that are done; all of them when `blocking`. Collective with `--async-save`."""
    saves = current().saves
    if saves is None:
        return
    saves.maybe_finalize_async_calls(blocking, no_dist=False)
    if terminate:
        saves.close()


def load_checkpoint(
    ddp_model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    load_arg: str = "load",
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
) -> tuple[int, float]:
    """Load what `--load` names into model, optimizer, schedule and random states; collective.

    Returns:
        Iteration and operations so far; zeros when there is no checkpoint yet or with `--finetune`.

    Raises:
        CheckpointError: missing, damaged, or of another shape or layout than the run.
    """
    args = get_args()
    found = _find(args, load_arg)
    if found is None:
        print_rank_0(f"no checkpoint in {args.load} yet: starting from random weights")
        return 0, 0
    sharded = dist_checkpointing.check_is_distributed_checkpoint(str(found.directory))
    print_rank_0(
        f" loading {'distributed ' if sharded else ''}checkpoint from {found.directory.parent} at iteration {found.iteration}"
    )
    loader = _load_sharded if sharded else _load_torch
    state = loader(args, found, unwrap_model(ddp_model), optimizer, opt_param_scheduler, checkpointing_context)
    current().events.fire("checkpoint_load", iteration=found.iteration, state=state)
    fresh = bool(args.finetune or found.release)
    if not fresh:
        _restore_counts(args, state["args"])
    if not skip_load_to_model_and_opt:
        _restore_model(ddp_model, state, strict)
    if fresh or args.no_load_optim:
        if (args.fp16 or args.bf16) and optimizer is not None:
            optimizer.reload_model_params()
    else:
        _restore_optimizer(args, state, found, sharded, optimizer, opt_param_scheduler)
    if not fresh:
        if "rerun_state_machine" in state:
            get_rerun_state_machine().load_state_dict(state["rerun_state_machine"])
        if not args.no_load_rng:
            restore_rng(args, state, found.directory)
    torch.distributed.barrier()
    iteration = 0 if fresh else int(state["iteration"])
    print_rank_0(f"  successfully loaded checkpoint from {found.directory.parent} {_place()} at iteration {iteration}")
    return iteration, state.get("num_floating_point_operations_so_far", 0)


def _find(args: argparse.Namespace, load_arg: str) -> Found | None:
    """The checkpoint to read; `--pretrained-checkpoint` stands in while `--load` is still empty."""
    options = {"mode": args.ckpt_verify, "team": team()}
    load = getattr(args, load_arg)
    save = args.save if not args.exit_on_missing_checkpoint else None
    if args.pretrained_checkpoint is None:
        return find_checkpoint(load, save=save, step=args.ckpt_step, **options)
    found = find_checkpoint(load, save=load, step=args.ckpt_step, **options)
    if found is None:
        print_rank_0(f"fine-tuning from {args.pretrained_checkpoint}, because {load} has no checkpoint yet")
        args.finetune = True
        found = find_checkpoint(args.pretrained_checkpoint, **options)
    return found


def _load_sharded(
    args: argparse.Namespace, found: Found, model: list[torch.nn.Module], optimizer: Any, scheduler: Any, context: Any
) -> dict[str, Any]:
    directory = str(found.directory)
    common = dist_checkpointing.load_common_state_dict(directory)
    old = common["args"]
    _check_args(old, args, found, "torch_dist")
    fresh, same_layout = bool(args.finetune or found.release), layout_of(old) == layout_of(args)
    with_optimizer = not (fresh or args.no_load_optim or getattr(old, "no_save_optim", False))
    with_rng = not (fresh or args.no_load_rng or getattr(old, "no_save_rng", False)) and same_layout
    options: dict[str, Any] = {"is_loading": True}
    if with_optimizer and args.use_distributed_optimizer:
        whole = getattr(old, "ckpt_fully_parallel_save", False)
        options["sharding_type"] = "fully_sharded_model_space" if whole else "dp_zero_gather_scatter"
        if not whole and not same_layout:
            raise CheckpointError(
                f"{found.directory} was saved with --no-ckpt-fully-parallel-save for tensor x pipeline {layout_of(old)} and cannot be "
                f"loaded for {layout_of(args)}. Use that layout, or --no-load-optim."
            )
    machine = get_rerun_state_machine()
    with_rerun = not fresh and same_layout and "rerun_state_machine" in common
    wanted = generate_state_dict(
        args,
        model,
        optimizer if with_optimizer else None,
        scheduler if with_optimizer else None,
        ckpt_format="torch_dist",
        rng_state=get_rng_state("torch_dist") if with_rng else None,
        rerun_state=machine.state_dict(None, "torch_dist") if with_rerun else None,
        optimizer_options=options,
    )
    strategy = get_default_load_sharded_strategy(directory)
    if args.ckpt_fully_parallel_load:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    if context is not None:
        context["load_strategy"] = strategy
    state = dist_checkpointing.load(wanted, directory, strategy, strict=args.dist_ckpt_strictness)
    if not with_rerun:
        state.pop("rerun_state_machine", None)
    return state


def _check_args(saved: argparse.Namespace, args: argparse.Namespace, found: Found, ckpt_format: str) -> None:
    """Refuse a checkpoint of another model; features say first what their saved numbers mean."""
    current().events.fire("checkpoint_args", saved=saved)
    check_fits(vars(saved), vars(args), format=ckpt_format, directory=found.directory)


def _load_torch(
    args: argparse.Namespace, found: Found, model: list[torch.nn.Module], optimizer: Any, scheduler: Any, context: Any
) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        path = found.directory / rank_directory() / "model_optim_rng.pt"
        if not path.is_file():
            there = ", ".join(sorted(child.name for child in found.directory.iterdir() if child.is_dir()))
            raise CheckpointError(
                f"{path} does not exist: the checkpoint was saved in another parallel layout (it has {there}). "
                "Use that layout, or a checkpoint of --ckpt-format torch_dist."
            )
        state = torch.load(path, map_location="cpu", weights_only=False)
        _check_args(state["args"], args, found, "torch")
        return state

    states: list[dict[str, Any]] = []
    team().together(lambda: states.append(read()))
    return states[0]


def _restore_counts(args: argparse.Namespace, old: argparse.Namespace) -> None:
    for name in ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"):
        setattr(args, name, getattr(old, name, 0))
    update_num_microbatches(consumed_samples=args.consumed_train_samples, verbose=True)


def _restore_model(model: list[torch.nn.Module], state: dict[str, Any], strict: bool) -> None:
    for index, chunk in enumerate(model):
        if len(model) > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        chunk.load_state_dict(state["model" if len(model) == 1 else f"model{index}"], strict=strict)


def _restore_optimizer(
    args: argparse.Namespace, state: dict[str, Any], found: Found, sharded: bool, optimizer: Any, scheduler: Any
) -> None:
    if "opt_param_scheduler" not in state:
        raise CheckpointError(f"{found.directory} holds no optimizer state. Load it with --no-load-optim or --finetune.")
    if optimizer is not None and not optimizer.is_stub_optimizer:
        optimizer.load_state_dict(state["optimizer"])
        if args.use_distributed_optimizer and not sharded:
            optimizer.load_parameter_state(str(found.directory / rank_directory() / "distrib_optim.pt"))
    if scheduler is not None:
        scheduler.load_state_dict(state["opt_param_scheduler"])
