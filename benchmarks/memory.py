"""Counted effects of memory features."""

from __future__ import annotations

from typing import Any
from unittest import mock

from benchmarks._case import Check, Counted, Run, case
from benchmarks.step import train_with
from mindspeed.testing.parity import SEQ_LENGTH
from mindspeed.testing.pool import pools

STAGES, CHUNKS, LAYERS, MICROS, COUNT = 2, 2, 16, 4, 3


def _recomputed_on_rank(world: Any, flags: str) -> tuple[list[float], int]:
    """Losses, and layers recomputed for each micro batch by this rank."""
    from megatron.core.transformer import transformer_block

    calls = 0
    run = transformer_block.tensor_parallel.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(*args, **kwargs)

    with mock.patch.object(transformer_block.tensor_parallel, "checkpoint", counted):
        steps = train_with(flags, SEQ_LENGTH)
    return steps.losses, calls // (MICROS * len(steps.moments))


@case(
    "memory.recompute_layers_per_pp_rank", feature="enable-recompute-layers-per-pp-rank", metric="fraction", better="equal",
    must=1.0, unit="layers",
)  # fmt: skip
def recomputed_layers(run: Run) -> Counted:
    """Layers that a pipeline rank of two chunks recomputes for --recompute-num-layers 3; the host recomputes 3 in each chunk."""
    flags = (
        f"--num-layers {LAYERS} --pipeline-model-parallel-size {STAGES} --global-batch-size {MICROS} --micro-batch-size 1"
        f" --num-layers-per-virtual-pipeline-stage {LAYERS // STAGES // CHUNKS}"
        f" --recompute-granularity full --recompute-method block --recompute-num-layers {COUNT}"
    )
    pool = pools().get(STAGES, megatron=True)
    ours, host = (
        pool.run(_recomputed_on_rank, f"{flags} {option}") for option in ("--enable-recompute-layers-per-pp-rank", "")
    )
    pairs = zip(ours[-1][0], host[-1][0], strict=True)
    return Counted(
        ours=max(layers for _, layers in ours), floor=COUNT, peers={"host": max(layers for _, layers in host)},
        check=Check(max(abs(a - b) / abs(b) for a, b in pairs), 1e-6, "losses of all steps"),
        workload={"stages": STAGES, "chunks": CHUNKS, "layers": LAYERS, "recompute": COUNT},
    )  # fmt: skip
