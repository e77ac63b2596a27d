"""Rules of activation recomputation that megatron-core leaves to an assertion or an IndexError in the first step."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mindspeed.errors import Problem


def recompute_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Granularity, method and number of layers fit each other and the chunks of the model."""
    granularity, method = args.recompute_granularity, args.recompute_method
    if granularity == "selective" and method:
        yield Problem("--recompute-method", method, "belongs to --recompute-granularity full", "remove it")
    if granularity == "full" and not method:
        yield Problem("--recompute-granularity", "full", "needs --recompute-method", "give uniform or block")
    if granularity == "full" and method and args.recompute_num_layers is None:
        yield Problem("--recompute-method", method, "needs --recompute-num-layers", "give the layers of one unit")
    if method == "uniform" and args.recompute_num_layers == 0:  # megatron-core would step through the layers for ever
        yield Problem("--recompute-num-layers", 0, "is no unit for --recompute-method uniform", "use 1 or more")
    if args.distribute_saved_activations and (
        args.tensor_model_parallel_size == 1 or granularity != "full" or args.sequence_parallel
    ):
        rule = "needs full recompute and tensor parallelism without sequence parallelism"
        yield Problem("--distribute-saved-activations", None, rule, "remove it")
    chunks = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    uneven = args.decoder_first_pipeline_num_layers is not None or args.decoder_last_pipeline_num_layers is not None
    uneven |= args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split or bool(args.noop_layers)
    unit, layers = args.recompute_num_layers, (args.num_layers or 0) // chunks
    if method == "uniform" and unit and not uneven and layers % unit:
        fits = ", ".join(str(size) for size in range(1, layers + 1) if layers % size == 0)
        rule = f"must divide the {layers} layers of each model chunk for --recompute-method uniform"
        yield Problem("--recompute-num-layers", unit, rule, f"give one of {fits}, or use --recompute-method block")
