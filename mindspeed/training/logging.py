"""The training log: Megatron-LM's line, TensorBoard's points, the status line and the loss curve."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_utils import track_moe_metrics
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from mindspeed.training import flops
from mindspeed.training.report import (
    is_last_rank,
    item,
    print_rank_last,
    reduce_max_stat_across_model_parallel_group,
    report_memory,
    timestamp,
)
from mindspeed.training.session import current, get_args, get_tensorboard_writer, get_timers

TIMERS = (
    "forward-backward", "forward-compute", "backward-compute", "batch-generator", "forward-recv", "forward-send",
    "backward-recv", "backward-send", "forward-send-forward-recv", "forward-send-backward-recv",
    "backward-send-forward-recv", "backward-send-backward-recv", "forward-backward-send-forward-backward-recv",
    "layernorm-grads-all-reduce", "embedding-grads-all-reduce", "all-grads-sync", "params-all-gather",
    "optimizer-copy-to-main-grad", "optimizer-unscale-and-check-inf", "optimizer-clip-main-grad",
    "optimizer-count-zeros", "optimizer-inner-step", "optimizer-copy-main-to-model-params", "optimizer",
)  # fmt: skip
_ADVANCED, _SKIPPED, _NAN = "advanced iterations", "skipped iterations", "nan iterations"


def num_floating_point_operations(args: argparse.Namespace, batch_size: int) -> float:
    """Operations of one step with `batch_size` sequences (see `mindspeed.training.flops`)."""
    return flops.num_floating_point_operations(args, batch_size)


def _accumulate(loss_dict: dict[str, Any], totals: dict[str, Any], skipped: int) -> None:
    """Add one step to the sums since the last log line."""
    totals[_ADVANCED] = totals.get(_ADVANCED, 0) + (0 if skipped else 1)
    totals[_SKIPPED] = totals.get(_SKIPPED, 0) + skipped
    nan = False
    for key, loss in loss_dict.items():
        if skipped:
            nan = nan or not math.isfinite(item(loss.float().sum()))
        else:
            totals[key] = totals.get(key, torch.zeros(1, device=torch.cuda.current_device())) + loss
    totals[_NAN] = totals.get(_NAN, 0) + int(nan)


def training_log(  # noqa: PLR0913 - the host's signature
    loss_dict: dict[str, Any],
    total_loss_dict: dict[str, Any],
    learning_rate: float | None,
    decoupled_learning_rate: float | None,
    iteration: int,
    loss_scale: float,
    report_memory_flag: bool,
    skipped_iter: int,
    grad_norm: float | None,
    params_norm: float | None,
    num_zeros_in_grad: float | None,
) -> bool:
    """Count one step and, every `--log-interval` steps, print the line.

    Args:
        loss_dict: losses of this step, on the last stage only.
        total_loss_dict: sums since the last line; changed in place.

    Returns:
        Whether device memory is still to be reported.
    """
    args, timers = get_args(), get_timers()
    _accumulate(loss_dict, total_loss_dict, skipped_iter)
    batch_size = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
    steps = total_loss_dict[_ADVANCED] + total_loss_dict[_SKIPPED]
    at_line = iteration % args.log_interval == 0
    at_point = args.tensorboard_dir is not None and iteration % args.tensorboard_log_interval == 0
    if at_line or at_point:
        learning_rate = reduce_max_stat_across_model_parallel_group(learning_rate)
    stats = {
        "learning-rate": learning_rate, "decoupled-learning-rate": decoupled_learning_rate, "batch-size": batch_size,
        "loss-scale": loss_scale, "grad-norm": grad_norm, "num-zeros": num_zeros_in_grad, "params-norm": params_norm,
    }  # fmt: skip
    if at_point:
        _tensorboard(iteration, loss_dict, stats, steps)
    _model_losses(args, iteration, total_loss_dict)
    if current().progress is not None:
        current().progress.update(iteration, loss_dict, batch_size * args.seq_length)
    if not at_line:
        return report_memory_flag
    metrics = _metrics(args, iteration, total_loss_dict, stats, timers("interval-time").elapsed(barrier=True) / steps)
    current().events.fire("log_line", metrics=metrics)
    print_rank_last(log_line(args, metrics))
    _remember(iteration, metrics)
    for key in (_ADVANCED, _SKIPPED, _NAN):
        total_loss_dict[key] = 0
    if report_memory_flag:
        report_memory(f"(after {iteration} iterations)")
    timers.log(list(TIMERS), normalizer=args.log_interval)
    return False


def _metrics(
    args: argparse.Namespace, iteration: int, totals: dict[str, Any], stats: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What the line shows, in its order; a handler of the event `log_line` may add entries."""
    throughput = num_floating_point_operations(args, stats["batch-size"]) / (seconds * 1e12 * args.world_size)
    writer = get_tensorboard_writer()
    if args.log_timers_to_tensorboard and writer:
        writer.add_scalar("iteration-time", seconds, iteration)
        if args.log_throughput:
            writer.add_scalar("throughput", throughput, iteration)
    metrics: dict[str, Any] = {
        "iteration": iteration,
        "consumed samples": args.consumed_train_samples,
        "skipped samples": args.skipped_train_samples or None,
        "elapsed time per iteration (ms)": seconds * 1000.0,
        "throughput per GPU (TFLOP/s/GPU)": throughput if args.log_throughput else None,
        "learning rate": stats["learning-rate"],
        "decoupled learning rate": stats["decoupled-learning-rate"],
        "global batch size": stats["batch-size"],
    }
    for key in [key for key in totals if key not in (_ADVANCED, _SKIPPED, _NAN)]:
        average = item(totals[key]) / max(1, totals[_ADVANCED])
        metrics[key] = average if average > 0.0 else None
        totals[key] = torch.zeros(1, device=torch.cuda.current_device())
    return metrics | {
        "loss scale": stats["loss-scale"],
        "grad norm": stats["grad-norm"],
        "num zeros": stats["num-zeros"],
        "params norm": stats["params-norm"],
        "number of skipped iterations": totals[_SKIPPED],
        "number of nan iterations": totals[_NAN],
    }


_FORMATS = {
    "consumed samples": "{:12d}",
    "skipped samples": "{:12d}",
    "elapsed time per iteration (ms)": "{:.1f}",
    "throughput per GPU (TFLOP/s/GPU)": "{:.1f}",
    "learning rate": "{:.6E}",
    "decoupled learning rate": "{:.6E}",
    "global batch size": "{:5d}",
    "loss scale": "{:.1f}",
    "grad norm": "{:.3f}",
    "num zeros": "{}",
    "params norm": "{:.3f}",
    "number of skipped iterations": "{:3d}",
    "number of nan iterations": "{:3d}",
}


def log_line(args: argparse.Namespace, metrics: dict[str, Any]) -> str:
    """The line of the host, entry for entry; entries whose value is None are left out."""
    parts = [f" [{timestamp()}] iteration {metrics['iteration']:8d}/{args.train_iters:8d} |"]
    for key, value in metrics.items():
        if key != "iteration" and value is not None:
            form = _FORMATS.get(key, "{:.6E}" if isinstance(value, float) else "{}")
            parts.append(f" {key}: {form.format(value)} |")
    return "".join(parts)


def _tensorboard(iteration: int, loss_dict: dict[str, Any], stats: dict[str, Any], steps: int) -> None:
    """Write one point of every curve, over steps and over samples, under the host's tags."""
    args, timers, writer = get_args(), get_timers(), get_tensorboard_writer()
    if args.log_timers_to_tensorboard:
        timers.write(list(TIMERS), writer, iteration, normalizer=steps)  # collective: every rank calls
    if writer is None:
        return
    points = {key: value for key, value in stats.items() if value is not None} | loss_dict
    if not args.log_loss_scale_to_tensorboard:
        del points["loss-scale"]
    if args.log_world_size_to_tensorboard:
        points["world-size"] = args.world_size
    for tag, value in points.items():
        writer.add_scalar(tag, value, iteration)
        if tag != "decoupled-learning-rate":
            writer.add_scalar(f"{tag} vs samples", value, args.consumed_train_samples)
    if args.skipped_train_samples > 0:
        writer.add_scalar("skipped-train-samples", args.skipped_train_samples, iteration)
    if args.log_memory_to_tensorboard:
        memory = torch.cuda.memory_stats()
        for tag, key in (
            ("mem-reserved-bytes", "reserved_bytes.all.current"),
            ("mem-allocated-bytes", "allocated_bytes.all.current"),
            ("mem-max-allocated-bytes", "allocated_bytes.all.peak"),
            ("mem-allocated-count", "allocation.all.current"),
        ):
            writer.add_scalar(tag, memory[key], iteration)


def _model_losses(args: argparse.Namespace, iteration: int, totals: dict[str, Any]) -> None:
    """Add the losses that layers keep to themselves: routers and multi-token prediction."""
    writer = get_tensorboard_writer()
    if args.num_experts is not None:
        names = ["load_balancing_loss"] if args.moe_router_load_balancing_type in ("aux_loss", "seq_aux_loss") else []
        names += ["z_loss"] if args.moe_z_loss_coeff is not None else []
        track_moe_metrics(
            loss_scale=1 / get_num_microbatches(),
            iteration=iteration,
            writer=writer,
            wandb_writer=None,
            total_loss_dict=totals,
            per_layer_logging=args.moe_per_layer_logging,
            force_initialize=True,
            track_names=names,
            num_layers=args.num_layers,
            moe_layer_freq=args.moe_layer_freq,
        )
    if args.mtp_num_layers is not None:
        MTPLossLoggingHelper.track_mtp_metrics(1 / get_num_microbatches(), iteration, writer, None, totals)


def _remember(iteration: int, metrics: dict[str, Any]) -> None:
    if current().history is not None and is_last_rank():
        current().history.add(iteration, "train", metrics.get("lm loss"), metrics["learning rate"])


def validation_lines(prefix: str, losses: dict[str, float]) -> list[str]:
    """The three lines that report an evaluation."""
    text = f" validation loss at {prefix} | "
    for key, value in losses.items():
        text += f"{key} value: {value:.6E} | {key} PPL: {math.exp(min(20, value)):.6E} | "
    rule = "-" * (len(text) + 1)
    return [rule, text, rule]
