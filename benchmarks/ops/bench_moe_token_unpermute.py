"""Weighted return of expert outputs to token order."""

import torch

from benchmarks._case import Floor, Run, Timing, case, operator_timing
from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute

TOKENS, TOP, HIDDEN = 4096, 2, 2048


def eager(permuted, sorted_indices, probs):
    """The host's form: promote by the probabilities, then scatter-add."""
    order = torch.argsort(sorted_indices)
    weighted = permuted * probs.flatten()[order].unsqueeze(1)
    target = (order // TOP).unsqueeze(1).expand(-1, permuted.shape[1])
    return weighted.new_zeros(probs.shape[0], permuted.shape[1]).scatter_add(0, target, weighted).to(permuted.dtype)


@case("ops.unpermute.bf16", feature="moe_token_permute", metric="ratio", against="eager", must=4.0, aim=10.0, preset="smoke")
def bf16(run: Run) -> Timing:
    """Unpermute of 4096 x 2 rows of 2048 with float32 probabilities, both ways, bfloat16."""

    def inputs(tokens=1024 if run.preset == "smoke" else TOKENS):
        permuted = torch.randn(tokens * TOP, HIDDEN).bfloat16().requires_grad_()
        return permuted, torch.randperm(tokens * TOP).int(), torch.rand(tokens, TOP).requires_grad_()

    return operator_timing(
        npu_moe_token_unpermute,
        eager,
        inputs,
        peers={"eager": eager},
        floor=Floor(bytes=3 * (TOKENS + TOKENS * TOP) * HIDDEN * 2),
        workload={"tokens": TOKENS, "top_k": TOP, "hidden": HIDDEN, "dtype": "torch.bfloat16"},
        check_inputs=lambda: inputs(32),
    )
