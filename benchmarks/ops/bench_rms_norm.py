"""RMSNorm forward and backward."""

import torch

from benchmarks._case import Floor, Run, Timing, case, operator_timing
from mindspeed.ops.rms_norm import rms_norm

ROWS, HIDDEN = 8192, 4096


def eager(x, gamma):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * gamma


def timing(dtype: torch.dtype, rows: int) -> Timing:
    def inputs(rows=rows):
        return torch.randn(rows, HIDDEN).to(dtype).requires_grad_(), torch.randn(HIDDEN).to(dtype).requires_grad_()

    return operator_timing(
        rms_norm,
        eager,
        inputs,
        peers={
            "eager": eager,
            "torch.rms_norm": lambda x, gamma: torch.nn.functional.rms_norm(x, (HIDDEN,), gamma, 1e-6),
            "torch.compile": torch.compile(eager),
        },
        floor=Floor(bytes=5 * rows * HIDDEN * dtype.itemsize),
        workload={"rows": rows, "hidden": HIDDEN, "dtype": str(dtype)},
        check_inputs=lambda: inputs(64),
    )


def rows(run: Run) -> int:
    return 1024 if run.preset == "smoke" else ROWS


@case("ops.rms_norm.bf16", feature="rms_norm", metric="ratio", against="eager", must=5.0, aim=7.0, preset="smoke")
def bf16(run: Run) -> Timing:
    """RMSNorm, both ways, bfloat16."""
    return timing(torch.bfloat16, rows(run))


@case("ops.rms_norm.fp32", feature="rms_norm", metric="ratio", against="eager", must=3.0, aim=4.0)
def fp32(run: Run) -> Timing:
    """RMSNorm, both ways, float32."""
    return timing(torch.float32, rows(run))


@case("ops.rms_norm.bf16.compile", feature="rms_norm", metric="ratio", against="torch.compile", must=0.8, aim=1.0)
def against_compile(run: Run) -> Timing:
    """RMSNorm, both ways, bfloat16, against torch.compile."""
    return timing(torch.bfloat16, rows(run))
