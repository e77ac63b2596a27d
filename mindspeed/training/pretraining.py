"""A whole training job: set up, train, evaluate, draw the curve, take down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.utils import get_model_config

from mindspeed.training import checkpointing, data, evaluation, forward, initialize, loop, plots
from mindspeed.training import model as models
from mindspeed.training.arguments import ArgumentsProvider
from mindspeed.training.checkpoint_state import team
from mindspeed.training.history import History
from mindspeed.training.progress import Progress, on_terminal
from mindspeed.training.report import append_to_progress_log, is_last_rank, print_rank_0, timestamp
from mindspeed.training.run_state import Run
from mindspeed.training.session import current, get_args, get_timers
from mindspeed.training.signals import SignalWatch


@dataclasses.dataclass(frozen=True)
class Result:
    """What `pretrain` achieved: last iteration, points of the curve (last rank only), and the picture."""

    iteration: int
    history: History | None
    plot: Path | None


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
        run.iteration, run.operations = loop.train(
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
