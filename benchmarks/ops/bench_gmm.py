"""Grouped matrix multiplication, forward."""

import torch

from benchmarks._case import Floor, Run, Timing, case, operator_timing
from mindspeed.ops.gmm import npu_gmm_v2


def loop(x, weight, sizes):
    parts = x.split(sizes.tolist())
    return torch.cat([part @ weight[index] for index, part in enumerate(parts)])


def grouped(x, weight, sizes):
    return torch.nn.functional.grouped_mm(x, weight, offs=sizes.cumsum(0).to(torch.int32))


def batched(x, weight, sizes):
    return torch.bmm(x.view(weight.shape[0], -1, x.shape[1]), weight).flatten(0, 1)


def timing(groups: int, rows: int, inner: int, outer: int) -> Timing:
    def inputs(groups=groups):
        x, weight = torch.randn(groups * rows, inner).bfloat16(), torch.randn(groups, inner, outer).bfloat16()
        return x, weight, torch.full((groups,), rows)

    return operator_timing(
        lambda x, weight, sizes: npu_gmm_v2(x, weight, group_list=sizes),
        loop,
        inputs,
        mode="forward",
        peers={"loop": loop, "grouped_mm": grouped, "bmm": batched},
        floor=Floor(flops=2 * groups * rows * inner * outer, dtype=torch.bfloat16),
        workload={"groups": groups, "rows": rows, "inner": inner, "outer": outer, "dtype": "torch.bfloat16"},
        check_inputs=lambda: inputs(2),
    )


@case("ops.gmm.16x256", feature="gmm", metric="ratio", against="loop", must=1.0, aim=1.1)
def large(run: Run) -> Timing:
    """16 groups of 256 rows, 1024 -> 1408, bfloat16."""
    return timing(16, 256, 1024, 1408)


@case("ops.gmm.64x32", feature="gmm", metric="ratio", against="bmm", must=0.95, aim=1.0, preset="smoke")
def small(run: Run) -> Timing:
    """64 groups of 32 rows, 1024 -> 512, bfloat16."""
    return timing(64, 32, 1024, 512)
