"""The training loop: steps and what happens between them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_current_running_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import check_param_hashes_across_dp_replicas

from mindspeed.errors import MindspeedError
from mindspeed.training import checkpointing, data, evaluation, leaving, logging
from mindspeed.training.profiling import StepProfiler
from mindspeed.training.report import (
    calc_params_l2_norm,
    logical_and_across_model_parallel_group,
    print_rank_0,
    reduce_max_stat_across_model_parallel_group,
    timestamp,
)
from mindspeed.training.run_state import ParamGatherHooks, Run
from mindspeed.training.session import current, get_args, get_timers


class StepOutcome(NamedTuple):
    """What a step did; the host's `train_step` returns the same seven values.

    Attributes:
        losses: by name, scalars; empty but on the last pipeline stage.
        skipped: 1 when the optimizer left the weights alone, else 0.
        should_checkpoint, should_exit, exit_code: what the rerun machine asks for.
        grad_norm: of all gradients before clipping; None when clipping is off.
        zeros: gradient elements that are zero; None unless they are counted.
    """

    losses: dict[str, torch.Tensor]
    skipped: int
    should_checkpoint: bool
    should_exit: bool
    exit_code: int
    grad_norm: float | None
    zeros: float | None


def train_step(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    config: Any,
) -> StepOutcome:
    """Forward and backward over all micro batches, then the optimizer."""
    args, timers = get_args(), get_timers()
    machine = get_rerun_state_machine()
    losses: list[dict[str, Any]] = []
    while machine.should_run_forward_backward(data_iterator):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step_func,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=False,
        )
    asked = machine.should_checkpoint_and_exit()
    if asked[1]:
        return StepOutcome({}, 1, *asked, None, None)
    _release_memory(1)
    timers("optimizer", log_level=1).start(barrier=args.barrier_with_L1_time)
    updated, grad_norm, zeros = optimizer.step()
    timers("optimizer").stop()
    # stages may differ: a frozen or empty one has no gradients of its own
    updated = logical_and_across_model_parallel_group(updated)
    grad_norm = reduce_max_stat_across_model_parallel_group(grad_norm)
    if args.log_num_zeros_in_grad:
        zeros = reduce_max_stat_across_model_parallel_group(zeros)
    if updated:
        opt_param_scheduler.step(increment=get_num_microbatches() * args.micro_batch_size * args.data_parallel_size)
    _release_memory(2)
    reduced = _mean_losses(losses) if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else {}
    return StepOutcome(reduced, int(not updated), *asked, grad_norm, zeros)


def _release_memory(level: int) -> None:
    if get_args().empty_unused_memory_level >= level:
        torch.cuda.empty_cache()


def _mean_losses(losses: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Losses over micro batches: a pair is (sum, tokens) and is weighed by its tokens."""
    means = {}
    for key in losses[0]:
        pairs = [loss[key] if isinstance(loss[key], tuple | list) else (loss[key], 1) for loss in losses]
        means[key] = sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)
    return means


def train(
    forward_step_func: Callable[..., Any],
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    train_data_iterator: Any,
    valid_data_iterator: Any,
    process_non_loss_data_func: Callable[..., Any] | None,
    config: Any,
    checkpointing_context: dict[str, Any],
    non_loss_data_func: Callable[..., Any] | None,
) -> tuple[int, float]:
    """Run steps until `--train-iters` or a reason to leave.

    Returns:
        Last iteration and floating-point operations so far.

    Raises:
        SystemExit: the rerun machine asks for an exit code.
    """
    args = get_args()
    run = Run(
        forward_step_func, model, optimizer, opt_param_scheduler, config, train_data_iterator, valid_data_iterator,
        checkpointing_context, args.iteration, args.num_floating_point_operations_so_far,
    )  # fmt: skip
    _prepare(run)
    hooks = ParamGatherHooks(run)
    hooks.hold()
    totals: dict[str, Any] = {}
    profiler = StepProfiler(args)
    report_memory, exit_code = True, 0
    current().events.fire("train_begin")
    while run.iteration < args.train_iters:
        checkpointing.maybe_finalize_async_save(blocking=False)
        _grow_batch(run, hooks)
        if run.iteration in args.iterations_to_skip:
            _skip_step(run)
            continue
        profiler.before(run.iteration)
        outcome = _step(run)
        profiler.after(run.iteration)
        if outcome.should_checkpoint:
            leaving.save_now(run, hooks)
        if outcome.should_exit:
            exit_code = outcome.exit_code
            current().notes["leaving"] = True
            break
        hooks.after_step(skipped=bool(outcome.skipped))
        report_memory = _log_step(run, outcome, totals, report_memory)
        _maybe_evaluate(run, hooks, process_non_loss_data_func, non_loss_data_func)
        _between_steps(run, hooks)
        if leaving.save_or_leave(run, hooks):
            current().notes["leaving"] = True
            break
    profiler.stop()
    current().events.fire("train_end")
    _finish(hooks)
    if exit_code:
        raise SystemExit(exit_code)
    return run.iteration, run.operations


def _prepare(run: Run) -> None:
    """Put the model in training mode and tell the schedules how gradients and parameters travel."""
    args, timers, config = get_args(), get_timers(), run.config
    if current().writer is not None:
        for name, value in vars(args).items():
            current().writer.add_text(name, str(value), global_step=args.iteration)
    for chunk in run.model:
        chunk.train()
    get_rerun_state_machine().current_iteration = run.iteration
    config.grad_scale_func = run.optimizer.scale_loss
    config.timers = timers
    if args.overlap_grad_reduce and isinstance(run.model[0], DistributedDataParallel):
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in run.model])
        if args.align_grad_reduce:
            config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in run.model])
    if args.overlap_param_gather and args.align_param_gather:
        config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in run.model])
    config.finalize_model_grads_func = finalize_model_grads
    if args.manual_gc:
        gc.disable()
        gc.collect()
    _check_replicas(run)
    timers("interval-time", log_level=0).start(barrier=True)
    print_rank_0(f"[before the start of training step] datetime: {timestamp()} ")


def _one_or_list(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def _grow_batch(run: Run, hooks: ParamGatherHooks) -> None:
    """Follow the batch-size ramp; a checkpoint is saved before each growth."""
    args = get_args()
    before = get_num_microbatches()
    update_num_microbatches(args.consumed_train_samples, consistency_check=False, verbose=True)
    if get_num_microbatches() != before and run.iteration != args.iteration and args.save:
        leaving.save_now(run, hooks)
    update_num_microbatches(args.consumed_train_samples, consistency_check=True, verbose=True)


def _skip_step(run: Run) -> None:
    """Draw a step's data without training on it (`--iterations-to-skip`)."""
    args = get_args()
    for _ in range(get_num_microbatches()):
        data.get_batch_on_this_cp_rank(data.get_batch_on_this_tp_rank(run.train_data))
    run.iteration += 1
    samples = args.data_parallel_size * args.micro_batch_size * get_num_microbatches()
    args.consumed_train_samples += samples
    args.skipped_train_samples += samples


def _step(run: Run) -> StepOutcome:
    args = get_args()
    args.curr_iteration = run.iteration
    current().events.fire("step_begin", iteration=run.iteration)
    # a feature may have put a function of its own there, which returns a plain tuple
    outcome = StepOutcome(*train_step(run.forward_step, run.train_data, run.model, run.optimizer, run.scheduler, run.config))
    if outcome.should_exit:
        return outcome
    current().events.fire("step_end", iteration=run.iteration)
    run.iteration += 1
    samples = args.data_parallel_size * args.micro_batch_size * get_num_microbatches()
    args.consumed_train_samples += samples
    args.skipped_train_samples += get_current_global_batch_size() - get_current_running_global_batch_size()
    run.operations += logging.num_floating_point_operations(args, samples)
    return outcome


def _log_step(run: Run, outcome: StepOutcome, totals: dict[str, Any], report_memory: bool) -> bool:
    args, optimizer = get_args(), run.optimizer
    scale = 1.0 if optimizer.is_stub_optimizer else optimizer.get_loss_scale().item()
    rates = {group["is_decoupled_lr"]: group["lr"] for group in optimizer.param_groups}
    norm = calc_params_l2_norm(run.model) if args.log_params_norm else None
    return logging.training_log(
        outcome.losses, totals, rates.get(False), rates.get(True), run.iteration, scale, report_memory, outcome.skipped,
        outcome.grad_norm, norm, outcome.zeros,
    )  # fmt: skip


def _maybe_evaluate(run: Run, hooks: ParamGatherHooks, process: Any, extra: Any) -> None:
    """Evaluate when `--eval-interval` says so; its time does not count as training time."""
    args, timers = get_args(), get_timers()
    if not (args.do_valid and args.eval_interval) or run.iteration % args.eval_interval:
        return
    timers("interval-time").stop()
    hooks.pause()
    if args.manual_gc and args.manual_gc_eval:
        gc.collect()
    evaluation.evaluate_and_print_results(
        f"iteration {run.iteration}", run.forward_step, run.valid_data, run.model, run.iteration, process, run.config,
        non_loss_data_func=extra,
    )  # fmt: skip
    hooks.resume()
    timers("interval-time", log_level=0).start(barrier=True)


def _between_steps(run: Run, hooks: ParamGatherHooks) -> None:
    args = get_args()
    if args.train_sync_interval and run.iteration % args.train_sync_interval == 0:
        torch.cuda.synchronize()
    interval = args.check_weight_hash_across_dp_replicas_interval
    if interval is not None and run.iteration % interval == 0:
        hooks.pause()
        _check_replicas(run)
        hooks.resume()
    if args.manual_gc and args.manual_gc_interval and run.iteration % args.manual_gc_interval == 0:
        gc.collect()


def _check_replicas(run: Run) -> None:
    """Compare the parameters of data-parallel replicas.

    Raises:
        MindspeedError: they differ; a replica computed or received something wrong.
    """
    if get_args().check_weight_hash_across_dp_replicas_interval is None:
        return
    if not check_param_hashes_across_dp_replicas(run.model, cross_check=True):
        raise MindspeedError(
            f"data-parallel replicas hold different weights after iteration {run.iteration}. Resume from the last checkpoint, "
            "and test the machines of this job if it happens again."
        )
    print_rank_0(f">>> Weight hashes match after {run.iteration} iterations...")


def _finish(hooks: ParamGatherHooks) -> None:
    if current().writer is not None:
        current().writer.flush()
    hooks.pause()
    checkpointing.maybe_finalize_async_save(blocking=True)
