"""Rotary position embedding forward and backward."""

import torch

from benchmarks._case import Floor, Run, Timing, case, operator_timing
from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding

POSITIONS, HEADS, SIZE = 4096, 16, 128


def eager(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def timing(positions: int) -> Timing:
    def inputs(positions=positions):
        x = torch.randn(positions, 1, HEADS, SIZE).bfloat16().requires_grad_()
        return x, torch.randn(positions, 1, 1, SIZE).bfloat16(), torch.randn(positions, 1, 1, SIZE).bfloat16()

    return operator_timing(
        npu_rotary_position_embedding,
        eager,
        inputs,
        peers={"eager": eager, "torch.compile": torch.compile(eager)},
        floor=Floor(bytes=4 * positions * HEADS * SIZE * 2),
        workload={"positions": positions, "heads": HEADS, "size": SIZE, "dtype": "torch.bfloat16"},
        check_inputs=lambda: inputs(64),
    )


def positions(run: Run) -> int:
    return 1024 if run.preset == "smoke" else POSITIONS


@case("ops.rotary.bf16", feature="rotary", metric="ratio", against="eager", must=2.0, aim=3.0, preset="smoke")
def bf16(run: Run) -> Timing:
    """Rotary embedding in halves, both ways, bfloat16."""
    return timing(positions(run))


@case("ops.rotary.bf16.compile", feature="rotary", metric="ratio", against="torch.compile", must=0.8, aim=1.0)
def against_compile(run: Run) -> Timing:
    """Rotary embedding in halves, both ways, bfloat16, against torch.compile."""
    return timing(positions(run))
