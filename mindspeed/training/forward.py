"""The forward step of a GPT and its loss, in the form that megatron-core's schedules call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import get_rerun_state_machine

from mindspeed.training import data
from mindspeed.training.session import get_args, get_timers

SPIKY_LOSS_FACTOR = 10  # a loss this many times the largest seen is reported
LossReport = tuple[torch.Tensor, torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor) -> LossReport:
    """Sum of the masked losses of a micro batch.

    Args:
        loss_mask: `[B, S]`, 1 where the loss counts.
        output_tensor: `[B, S]` losses.

    Returns:
        Sum of losses, number of tokens (int), and for the log the pair of both summed over data-parallel ranks.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    total = torch.stack([torch.sum(output_tensor.float().view(-1) * mask), mask.sum()])
    if args.context_parallel_size > 1:
        torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    _validate(args, total[0])
    reported = total.clone().detach()
    torch.distributed.all_reduce(reported, group=parallel_state.get_data_parallel_group())
    # the schedule frees its output; a view's base could not be freed, hence the clones
    return total[0].clone(), total[1].clone().detach().to(torch.int), {"lm loss": (reported[0], reported[1])}


def _validate(args: Any, loss: torch.Tensor) -> None:
    """Let the rerun machine judge the loss; NaN and Inf end the run."""
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, rejects in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            message = f"found {name} in local forward loss calculation"
            machine.validate_result(result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        spiky = functools.partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        machine.validate_result(result=loss, rejection_func=spiky, message="Spiky loss", tolerance=0.0, fatal=False)


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., LossReport]]:
    """Run the model on the next micro batch.

    Returns:
        Its output (losses `[B, S]` on the last stage, hidden states before it) and the loss function.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, attention_mask, position_ids = data.get_batch(data_iterator)
    timers("batch-generator").stop()
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, functools.partial(loss_func, loss_mask)
