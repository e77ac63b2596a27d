"""Validation and test: the loss on held-out data, without gradients and without dropout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

from mindspeed.training import logging
from mindspeed.training.report import any_rank, is_last_rank, print_rank_0, print_rank_last
from mindspeed.training.session import current, get_args, get_tensorboard_writer, get_timers

Evaluation = tuple[dict[str, torch.Tensor] | None, Any, bool]


def evaluate(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    process_non_loss_data_func: Callable[..., Any] | None,
    config: Any,
    verbose: bool = False,
    non_loss_data_func: Callable[..., Any] | None = None,
) -> Evaluation:
    """Average losses over `--eval-iters` global batches.

    Returns:
        Losses by name (empty before the last stage, None when the time limit was hit), what
        `non_loss_data_func(model)` returned, and whether the time limit was hit.
    """
    args, timers = get_args(), get_timers()
    timers("evaluate", log_level=0).start(barrier=True)
    machine = get_rerun_state_machine()
    mode = machine.get_mode()
    machine.set_mode(RerunMode.DISABLED)
    for chunk in model:
        chunk.eval()
    if verbose:
        print_rank_0(f"Evaluating on {args.eval_iters * args.global_batch_size} samples")
    sums: dict[str, torch.Tensor] = {}
    timed_out = False
    config.timers = None
    with torch.no_grad():
        for _ in range(args.eval_iters):
            _add(sums, _one_batch(forward_step_func, data_iterator, model))
            args.consumed_valid_samples += args.global_batch_size
            if timed_out := _time_is_up():
                print_rank_0("Exiting during evaluation, timelimit reached")
                break
        extra = non_loss_data_func(model) if non_loss_data_func is not None and not timed_out else None
    config.timers = timers
    for chunk in model:
        chunk.train()
    machine.set_mode(mode)
    timers("evaluate").stop()
    timers.log(["evaluate"])
    if timed_out:
        return None, None, True
    return {key: pair[0] / pair[1] for key, pair in sums.items()}, extra, False


def _one_batch(forward_step_func: Callable[..., Any], data_iterator: Any, model: list[torch.nn.Module]) -> list[dict[str, Any]]:
    args = get_args()
    return get_forward_backward_func()(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
    )


def _add(sums: dict[str, torch.Tensor], batch: list[dict[str, Any]]) -> None:
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return
    for losses in batch:
        for key, value in losses.items():
            loss, count = value if isinstance(value, tuple | list) else (value, 1)
            pair = sums.setdefault(key, torch.zeros(2, device=torch.cuda.current_device()))
            pair[0] += loss
            pair[1] += count


def _time_is_up() -> bool:
    args = get_args()
    if not args.exit_duration_in_mins:
        return False
    return any_rank(time.time() - current().begun > args.exit_duration_in_mins * 60.0)


def evaluate_and_print_results(
    prefix: str,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    iteration: int,
    process_non_loss_data_func: Callable[..., Any] | None,
    config: Any,
    verbose: bool = False,
    write_to_tensorboard: bool = True,
    non_loss_data_func: Callable[..., Any] | None = None,
) -> None:
    """Evaluate and print the validation block; `prefix` says where (`iteration 10 on test set`)."""
    args = get_args()
    tensors, extra, timed_out = evaluate(
        forward_step_func, data_iterator, model, process_non_loss_data_func, config, verbose, non_loss_data_func
    )
    if timed_out or tensors is None:
        return
    losses = {key: float(value) for key, value in tensors.items()}
    writer = get_tensorboard_writer() if write_to_tensorboard else None
    if writer:
        for key, value in losses.items():
            writer.add_scalar(f"{key} validation", value, iteration)
            writer.add_scalar(f"{key} validation vs samples", value, args.consumed_train_samples)
            if args.log_validation_ppl_to_tensorboard:
                perplexity = math.exp(min(20, value))
                writer.add_scalar(f"{key} validation ppl", perplexity, iteration)
                writer.add_scalar(f"{key} validation ppl vs samples", perplexity, args.consumed_train_samples)
    if process_non_loss_data_func is not None and writer and is_last_rank():
        process_non_loss_data_func(extra, iteration, writer)
    if current().history is not None and is_last_rank():
        kind = "test" if prefix.endswith("test set") else "validation"
        current().history.add(iteration, kind, losses.get("lm loss"))
    for line in logging.validation_lines(prefix, losses):
        print_rank_last(line)
