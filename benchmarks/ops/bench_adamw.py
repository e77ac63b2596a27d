"""AdamW steps on 32 M float32 parameters."""

import dataclasses

import torch

from benchmarks._case import Floor, Peer, Run, Timing, case, operator_timing
from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2
from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw

COUNT = 32 << 20
STEP = torch.tensor([3])


def ours(p, g, m, v):
    npu_apply_fused_adamw_v2(p, g, m, v, None, STEP, lr=1e-3, weight_decay=0.1)
    return p, m, v


def fused(p, g, m, v):
    torch._fused_adamw_(
        [p], [g], [m], [v], [], [STEP.float()], lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8, amsgrad=False,
        maximize=False,
    )  # fmt: skip
    return p, m, v


@torch.no_grad()
def formula(p, g, m, v):
    """The step as a function: the truth of the check."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    p = p * (1 - 1e-3 * 0.1) - 1e-3 / (1 - 0.9**3) * m / (v.sqrt() / (1 - 0.999**3) ** 0.5 + 1e-8)
    return p, m, v


def with_average(p, g, m, v, s):
    return npu_apply_fused_ema_adamw(g, p, m, v, s, STEP, lr=1e-3, weight_decay=0.1)


def separate(p, g, m, v, s):
    fused(p, g, m, v)
    return p, m, v, s.lerp_(p, 1e-4)


@torch.no_grad()
def formula_with_average(p, g, m, v, s):
    p, m, v = formula(p, g, m, v)
    return p, m, v, s + 1e-4 * (p - s)


def fresh(function):
    """The function on copies, so that a check can call it twice on the same inputs."""
    return lambda *inputs: function(*(value.detach().clone() for value in inputs))


class InPlace:
    """Times a step on tensors that were copied before; `fn` is the same on copies of its own, for the check."""

    reusable = True

    def __init__(self, step):
        self.step = step
        self.fn = fresh(step)

    def prepare(self, *inputs):
        return tuple(value.clone() for value in inputs)

    def call(self, *prepared):
        with torch.no_grad():
            return self.step(*prepared)


def timing(step, peers, truth, tensors: int, run: Run) -> Timing:
    def inputs(count=COUNT // 16 if run.preset == "smoke" else COUNT):
        return tuple(torch.rand(count) for _ in range(tensors))

    declared = operator_timing(
        fresh(step),
        truth,
        inputs,
        mode="forward",
        floor=Floor(bytes=(7 if tensors == 4 else 9) * COUNT * 4),
        workload={"parameters": COUNT},
        check_inputs=lambda: inputs(4096),
    )
    made = {name: Peer(make=lambda peer=peer: InPlace(peer), version=torch.__version__) for name, peer in peers.items()}
    return dataclasses.replace(declared, ours=InPlace(step), peers=made)


@case("ops.adamw.fp32", feature="adamw", metric="ratio", against="torch fused", must=0.95, aim=1.0, preset="smoke")
def adamw(run: Run) -> Timing:
    """AdamW step, float32, against torch's fused kernel."""
    return timing(ours, {"torch fused": fused}, formula, 4, run)


@case("ops.ema_adamw.fp32", feature="ema_adamw", metric="ratio", against="fused and lerp", must=0.95, aim=1.0)
def ema_adamw(run: Run) -> Timing:
    """AdamW step with moving average, float32, against torch's fused kernel and a separate lerp."""
    return timing(with_average, {"fused and lerp": separate}, formula_with_average, 5, run)
