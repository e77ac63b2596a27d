"""SwiGLU forward and backward."""

import torch
from torch.nn import functional as F

from benchmarks._case import Floor, Run, Timing, case, operator_timing
from mindspeed.ops.swiglu import swiglu

ROWS, HALF = 8192, 4096


def eager(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def timing(rows: int) -> Timing:
    def inputs(rows=rows):
        return (torch.randn(rows, 2 * HALF).bfloat16().requires_grad_(),)

    return operator_timing(
        swiglu,
        eager,
        inputs,
        peers={"eager": eager, "torch.compile": torch.compile(eager)},
        floor=Floor(bytes=8 * rows * HALF * 2),
        workload={"rows": rows, "half": HALF, "dtype": "torch.bfloat16"},
        check_inputs=lambda: inputs(64),
    )


def rows(run: Run) -> int:
    return 1024 if run.preset == "smoke" else ROWS


@case("ops.swiglu.bf16", feature="swiglu", metric="ratio", against="eager", must=1.6, aim=2.2, preset="smoke")
def bf16(run: Run) -> Timing:
    """SwiGLU, both ways, bfloat16."""
    return timing(rows(run))


@case("ops.swiglu.bf16.compile", feature="swiglu", metric="ratio", against="torch.compile", must=0.8, aim=1.0)
def against_compile(run: Run) -> Timing:
    """SwiGLU, both ways, bfloat16, against torch.compile."""
    return timing(rows(run))
