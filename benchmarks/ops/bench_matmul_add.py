"""Weight gradient added to a float32 accumulator."""

import torch

from benchmarks._case import Floor, Run, Timing, case, operator_timing
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32

TOKENS, INNER, OUTER = 4096, 1024, 1024


@torch.no_grad()
def ours(x, dy, grad):
    grad = grad.detach().clone()
    npu_matmul_add_fp32(x, dy, grad)
    return grad


@torch.no_grad()
def exact(x, dy, grad):
    return grad.detach().clone().addmm_(dy.to(grad.dtype).t(), x.to(grad.dtype))


@torch.no_grad()
def rounded(x, dy, grad):
    return grad.detach().clone().add_(dy.t() @ x)


@case("ops.matmul_add.fp32", feature="matmul_add", metric="ratio", against="exact addmm_", must=1.0, aim=1.6, preset="smoke")
def fp32(run: Run) -> Timing:
    """4096 x 1024 x 1024, bfloat16 operands, float32 target."""

    def inputs(tokens=1024 if run.preset == "smoke" else TOKENS):
        return torch.randn(tokens, INNER).bfloat16(), torch.randn(tokens, OUTER).bfloat16(), torch.randn(OUTER, INNER)

    return operator_timing(
        ours,
        exact,
        inputs,
        mode="forward",
        peers={"exact addmm_": exact, "rounded": rounded},
        floor=Floor(flops=2 * TOKENS * INNER * OUTER, dtype=torch.float32),
        workload={"tokens": TOKENS, "inner": INNER, "outer": OUTER},
        check_inputs=lambda: inputs(64),
    )
