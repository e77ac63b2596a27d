"""When a run saves, and for which reasons it ends before its last step."""

from __future__ import annotations

import time

import torch

from mindspeed.training import checkpointing
from mindspeed.training.report import any_rank, append_to_progress_log, print_rank_0, timestamp
from mindspeed.training.run_state import ParamGatherHooks, Run
from mindspeed.training.session import current, get_args, get_timers


def save_now(run: Run, hooks: ParamGatherHooks) -> None:
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


def save_or_leave(run: Run, hooks: ParamGatherHooks) -> bool:
    """Save where it is due; returns whether the run ends here, having saved."""
    args = get_args()
    reason = _reason_to_leave(run)
    due = args.save_interval and run.iteration % args.save_interval == 0
    if args.save and (due or reason) and current().notes.get("saved_at") != run.iteration:
        save_now(run, hooks)
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
