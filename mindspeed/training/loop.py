"""The training loop: steps, evaluations, checkpoints, and the reasons to leave."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_current_running_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import check_param_hashes_across_dp_replicas, get_model_config

from mindspeed.errors import MindspeedError
from mindspeed.training import checkpointing, data, evaluation, forward, initialize, logging, plots
from mindspeed.training import model as models
from mindspeed.training.arguments import ArgumentsProvider
from mindspeed.training.checkpoint_state import team
from mindspeed.training.history import History
from mindspeed.training.progress import Progress, on_terminal
from mindspeed.training.report import (
    any_rank,
    append_to_progress_log,
    calc_params_l2_norm,
    is_last_rank,
    logical_and_across_model_parallel_group,
    print_rank_0,
    reduce_max_stat_across_model_parallel_group,
    timestamp,
)
from mindspeed.training.session import current, get_args, get_timers
from mindspeed.training.signals import SignalWatch

StepResult = tuple[dict[str, torch.Tensor], int, bool, bool, int, float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What `pretrain` achieved: last iteration, points of the curve (last rank only), and the picture."""

    iteration: int
    history: History | None
    plot: Path | None


@dataclasses.dataclass
class Run:
    """What the loop carries from step to step."""

    forward_step: Callable[..., Any]
    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    config: Any
    train_data: Any
    valid_data: Any
    context: dict[str, Any]
    iteration: int
    operations: float
    saved_at: int = -1


def pretrain(
    train_valid_test_dataset_provider: data.DatasetsProvider = data.train_valid_test_datasets_provider,
    model_provider: models.ModelProvider | None = None,
    model_type: ModelType = ModelType.encoder_or_decoder,
    forward_step_func: Callable[..., Any] | None = None,
    process_non_loss_data_func: Callable[..., Any] | None = None,
    extra_args_provider: ArgumentsProvider | None = None,
    args_defaults: dict[str, Any] | None = None,
    non_loss_data_func: Callable[..., Any] | None = None,
    argv: list[str] | None = None,
    after_training: Callable[[list[torch.nn.Module]], None] | None = None,
) -> Result:
    """Train from a command line to the end, or to a reason to leave.

    Args:
        argv: the command line; that of the process if not given.
        after_training: called on every rank with the model chunks, before everything is taken down.
        others: as in Megatron-LM.

    Raises:
        ConfigError, CheckpointError, DataError, MindspeedError: each is one clear sentence.
    """
    try:
        initialize.initialize(extra_args_provider, args_defaults, argv)
        with SignalWatch() as signals:
            current().signals = signals
            run, iterators = _set_up(train_valid_test_dataset_provider, model_provider, model_type, forward_step_func)
            extra = (process_non_loss_data_func, non_loss_data_func)
            leaving = _train_all(run, extra)
            if not leaving:
                _final_evaluations(run, iterators, extra)
            checkpointing.maybe_finalize_async_save(blocking=True, terminate=True)
            plot = _draw()
            if after_training is not None:
                after_training(run.model)
        return Result(run.iteration, current().history, plot)
    finally:
        initialize.shut_down()


def _set_up(
    datasets: data.DatasetsProvider, model_provider: Any, model_type: ModelType, forward_step: Any
) -> tuple[Run, dict[str, Any]]:
    args, timers = get_args(), get_timers()
    context: dict[str, Any] = {}
    if args.save:
        _claim_save_folder(args)
    if args.log_progress:
        append_to_progress_log("Starting job")
    timers("model-and-optimizer-setup", log_level=0).start(barrier=True)
    provider = model_provider or models.provider_from_text(args.model_provider)
    model, optimizer, scheduler = models.setup_model_and_optimizer(provider, model_type, checkpointing_context=context)
    timers("model-and-optimizer-setup").stop()
    timers("train/valid/test-data-iterators-setup", log_level=0).start(barrier=True)
    iterators = _iterators(datasets, len(model))
    timers("train/valid/test-data-iterators-setup").stop()
    timers.log(["model-and-optimizer-setup", "train/valid/test-data-iterators-setup"], barrier=True)
    run = Run(
        forward_step=forward_step or forward.forward_step,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        config=get_model_config(model[0]),
        train_data=iterators["train"],
        valid_data=iterators["valid"],
        context=context,
        iteration=args.iteration,
        operations=args.num_floating_point_operations_so_far,
    )
    _open_history(args)
    return run, iterators


def _claim_save_folder(args: Any) -> None:
    """Lock the checkpoint folder for this job, and finish or remove what an interrupted save left in it."""
    from mindspeed.checkpoint import SaveLock, recover

    everyone = team()
    current().lock = SaveLock(args.save, team=everyone)
    current().lock.acquire()
    everyone.together(lambda: recover(args.save) if everyone.leads else None)


def _iterators(datasets: data.DatasetsProvider, chunks: int) -> dict[str, Any]:
    """Data iterators by split; a list with one for each model chunk in the interleaved schedule."""
    if chunks == 1:
        return dict(zip(("train", "valid", "test"), data.build_train_valid_test_data_iterators(datasets), strict=True))
    built = []
    for index in range(chunks):
        parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        built.append(data.build_train_valid_test_data_iterators(datasets))
    return dict(zip(("train", "valid", "test"), map(list, zip(*built, strict=True)), strict=True))


def _open_history(args: Any) -> None:
    if not is_last_rank():
        return
    plot = _plot_path(args)
    current().history = History(None if plot is None else plot.with_suffix(".jsonl"), args.iteration)
    if on_terminal() and not args.no_progress:
        current().progress = Progress(args.iteration, args.train_iters)


def _plot_path(args: Any) -> Path | None:
    if args.loss_plot:
        return Path(args.loss_plot)
    return Path(args.save) / "loss.png" if args.save else None


def _train_all(run: Run, extra: tuple[Any, Any]) -> bool:
    """Train; returns whether something else than the last step ended it."""
    args = get_args()
    leaving = False
    if args.skip_train:
        print_rank_0("skipping training (--skip-train is on) ...")
    elif args.do_train and run.iteration < args.train_iters:
        before = run.iteration
        run.iteration, run.operations = train(
            run.forward_step, run.model, run.optimizer, run.scheduler, run.train_data, run.valid_data,
            extra[0], run.config, run.context, extra[1],
        )  # fmt: skip
        leaving = current().notes.pop("leaving", False)
        print_rank_0(f"[after training is done] datetime: {timestamp()} ")
        saved = current().notes.get("saved_at") == run.iteration
        if args.save and not leaving and not saved and run.iteration != before:
            checkpointing.save_checkpoint(
                run.iteration, run.model, run.optimizer, run.scheduler, run.operations, run.context, run.train_data
            )
    if current().progress is not None:
        current().progress.close()
    return leaving


def _final_evaluations(run: Run, iterators: dict[str, Any], extra: tuple[Any, Any]) -> None:
    args = get_args()
    for due, split, name in ((args.do_valid, "valid", "validation"), (args.do_test, "test", "test")):
        if due:
            evaluation.evaluate_and_print_results(
                f"iteration {run.iteration} on {name} set", run.forward_step, iterators[split], run.model, run.iteration,
                extra[0], run.config, verbose=True, write_to_tensorboard=not args.skip_train, non_loss_data_func=extra[1],
            )  # fmt: skip


def _draw() -> Path | None:
    args, history = get_args(), current().history
    path = _plot_path(args)
    if history is None or path is None:
        return None
    title = (
        f"{args.num_layers} layers, hidden {args.hidden_size}, global batch {args.global_batch_size} x {args.seq_length} tokens"
    )
    drawn = plots.loss_curve(history, path, title)
    if drawn is not None:
        print(f"  loss curve: {drawn}", flush=True)
    return drawn


def train_step(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    config: Any,
) -> StepResult:
    """Forward and backward over all micro batches, then the optimizer.

    Returns:
        Losses (on the last stage), whether the update was skipped (0 or 1), whether to save, whether to
        exit, the exit code, gradient norm, number of zero gradient elements.
    """
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
    should_checkpoint, should_exit, exit_code = machine.should_checkpoint_and_exit()
    if should_exit:
        return {}, 1, should_checkpoint, should_exit, exit_code, None, None
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
    return reduced, int(not updated), should_checkpoint, should_exit, exit_code, grad_norm, zeros


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
    report_memory, exit_code = True, 0
    current().events.fire("train_begin")
    while run.iteration < args.train_iters:
        checkpointing.maybe_finalize_async_save(blocking=False)
        _grow_batch(run, hooks)
        if run.iteration in args.iterations_to_skip:
            _skip_step(run)
            continue
        outcome = _step(run)
        if outcome[2]:
            _save(run, hooks)
        if outcome[3]:
            exit_code = outcome[4]
            current().notes["leaving"] = True
            break
        hooks.after_step(skipped=bool(outcome[1]))
        report_memory = _log_step(run, outcome, totals, report_memory)
        if args.do_valid and args.eval_interval and run.iteration % args.eval_interval == 0:
            _evaluate(run, hooks, process_non_loss_data_func, non_loss_data_func)
        _between_steps(run, hooks)
        if _save_or_leave(run, hooks):
            current().notes["leaving"] = True
            break
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


class ParamGatherHooks:
    """Switches the gathers of `--overlap-param-gather` off where parameters must be whole: first step, saves, evaluation."""

    def __init__(self, run: Run) -> None:
        args = get_args()
        self._run = run
        self._used = args.use_distributed_optimizer and args.overlap_param_gather
        self._sync: Any = None
        self.on = False

    def hold(self) -> None:
        """Before the first step: errors of loading or initialisation must not spread by a gather."""
        if self._used:
            self._disable(param_sync=False)
            self._sync, self._run.config.param_sync_func = self._run.config.param_sync_func, None

    def after_step(self, *, skipped: bool) -> None:
        """The first step that changed parameters starts the gathers."""
        if self._used and not self.on and not skipped:
            self._run.config.param_sync_func = self._sync
            self._enable()

    def pause(self) -> None:
        """Make all parameters whole and leave them so."""
        if self.on:
            self._disable()
            self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        if getattr(self, "_paused", False):
            self._paused = False
            self._enable()

    def _enable(self) -> None:
        for chunk in self._run.model:
            chunk.enable_forward_pre_hook()
        self.on = True

    def _disable(self, param_sync: bool = True) -> None:
        for chunk in self._run.model:
            chunk.disable_forward_pre_hook(param_sync=param_sync)
        self.on = False


def _grow_batch(run: Run, hooks: ParamGatherHooks) -> None:
    """Follow the batch-size ramp; a checkpoint is saved before each growth."""
    args = get_args()
    before = get_num_microbatches()
    update_num_microbatches(args.consumed_train_samples, consistency_check=False, verbose=True)
    if get_num_microbatches() != before and run.iteration != args.iteration and args.save:
        _save(run, hooks)
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


def _step(run: Run) -> StepResult:
    args = get_args()
    args.curr_iteration = run.iteration
    current().events.fire("step_begin", iteration=run.iteration)
    outcome = train_step(run.forward_step, run.train_data, run.model, run.optimizer, run.scheduler, run.config)
    if outcome[3]:
        return outcome
    current().events.fire("step_end", iteration=run.iteration)
    run.iteration += 1
    samples = args.data_parallel_size * args.micro_batch_size * get_num_microbatches()
    args.consumed_train_samples += samples
    args.skipped_train_samples += get_current_global_batch_size() - get_current_running_global_batch_size()
    run.operations += logging.num_floating_point_operations(args, samples)
    return outcome


def _log_step(run: Run, outcome: StepResult, totals: dict[str, Any], report_memory: bool) -> bool:
    args, optimizer = get_args(), run.optimizer
    losses, skipped, _, _, _, grad_norm, zeros = outcome
    scale = 1.0 if optimizer.is_stub_optimizer else optimizer.get_loss_scale().item()
    rates = {group["is_decoupled_lr"]: group["lr"] for group in optimizer.param_groups}
    norm = calc_params_l2_norm(run.model) if args.log_params_norm else None
    return logging.training_log(
        losses, totals, rates.get(False), rates.get(True), run.iteration, scale, report_memory, skipped, grad_norm, norm, zeros
    )


def _evaluate(run: Run, hooks: ParamGatherHooks, process: Any, extra: Any) -> None:
    args, timers = get_args(), get_timers()
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


def _save(run: Run, hooks: ParamGatherHooks) -> None:
    """Save; its time does not count as training time."""
    args, timers = get_args(), get_timers()
    timers("interval-time").stop()
    timers("save-checkpoint", log_level=0).start(barrier=True)
    hooks.pause()
    checkpointing.save_checkpoint(
        run.iteration, run.model, run.optimizer, run.scheduler, run.operations, run.context, run.train_data
    )
    hooks.resume()
    timers("save-checkpoint").stop(barrier=True)
    timers.log(["save-checkpoint"])
    current().notes["saved_at"] = run.iteration
    if args.log_progress:
        tokens = args.consumed_train_samples * args.seq_length / 1e9
        word = "Saving async checkpoint" if args.async_save else "Saved checkpoint"
        rate = (run.operations - args.num_floating_point_operations_so_far) / (time.time() - current().begun) / 1e12
        append_to_progress_log(
            f"{word}\tIteration: {run.iteration}\tJob throughput: {rate / args.world_size:.1f} TFLOP/s/GPU\t"
            f"Floating-point operations: {run.operations:.2e}\tTokens (in billions): {tokens:.2f}"
        )
    timers("interval-time", log_level=0).start(barrier=True)


def _save_or_leave(run: Run, hooks: ParamGatherHooks) -> bool:
    """Save where it is due; returns whether the run ends here, having saved."""
    args = get_args()
    reason = _reason_to_leave(run)
    due = args.save_interval and run.iteration % args.save_interval == 0
    if args.save and (due or reason) and current().notes.get("saved_at") != run.iteration:
        _save(run, hooks)
    if not reason:
        return False
    torch.distributed.barrier()
    print_rank_0(f"[{reason}] datetime: {timestamp()} ")
    return True


def _reason_to_leave(run: Run) -> str:
    args = get_args()
    received = current().signals.received if current().signals is not None else None
    if any_rank(received is not None):
        return "exiting program after receiving SIGTERM."
    minutes = (time.time() - current().begun) / 60.0
    if args.exit_duration_in_mins and any_rank(minutes > args.exit_duration_in_mins):
        return f"exiting program after {minutes} minutes"
    if args.exit_interval and run.iteration % args.exit_interval == 0:
        return f"exiting program at iteration {run.iteration}"
    return ""


def _finish(hooks: ParamGatherHooks) -> None:
    if current().writer is not None:
        current().writer.flush()
    hooks.pause()
    checkpointing.maybe_finalize_async_save(blocking=True)
