"""Training with a feature beside the same training without it, in the situation that its page recommends it for.

What the original publishes for it (LLaMA2 7B on NPUs) stands in the workload of each case; it is never our figure.
No feature may make the step slower on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks._case import Check, Paired, Run, case
from benchmarks.step import train_with

LENGTH = 1024
COMMON = (
    f"--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length {LENGTH} --max-position-embeddings {LENGTH}"
    " --transformer-impl local --micro-batch-size 1 --global-batch-size 2 --attention-dropout 0 --hidden-dropout 0"
)
EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall --disable-bias-linear"
    " --use-flash-attn"
)
SLOWEST = 1 / 1.03


@dataclass(frozen=True)
class Claim:
    """`on` against `off`, both added to the flags `situation`; `published` is the original's gain on NPUs."""

    on: str
    situation: str
    off: str = ""
    published: str = "none"

    def flags(self, on: bool) -> str:
        """The whole command line of one side."""
        return f"{COMMON} --bf16 {self.situation} {self.on if on else self.off}"


CLAIMS = {
    "flash-attention": Claim("--use-flash-attn", "", published="+34 %"),
    "fusion-attention-v2": Claim("--use-fusion-attn-v2", ""),
    "fused-rmsnorm": Claim("--use-fused-rmsnorm", "--use-flash-attn --normalization RMSNorm", published="+2.7 %, memory -12 %"),
    "fused-swiglu": Claim("--use-fused-swiglu", "--use-flash-attn --swiglu", published="+4.7 %, memory -16.6 %"),
    "fused-rotary-pos-emb": Claim(
        "--use-fused-rotary-pos-emb", "--use-flash-attn --position-embedding-type rope", published="+1 %"
    ),
    "fused-softmax": Claim("", "", off="--disable-fused-ops softmax"),
    "gradient-accumulation-fusion": Claim("", "--use-flash-attn", off="--no-gradient-accumulation-fusion", published="+2 %"),
    "grouped-gemm": Claim("--gemm-gradient-accumulation-fusion", EXPERTS),
    "moe-permute-fusion": Claim("--moe-permute-fusion", EXPERTS),
    "noop-layers": Claim("--num-layers 4 --noop-layers 1,3", "--use-flash-attn", published="above +10 % with pipelines"),
    "cross-entropy-loss-fusion": Claim("--cross-entropy-loss-fusion", "--use-flash-attn"),
    "disable-fused-ops": Claim(
        "--disable-fused-ops wgrad,rmsnorm,swiglu,rope,softmax",
        "--use-flash-attn --normalization RMSNorm --swiglu --position-embedding-type rope",
        off="--no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-rope-fusion --no-masked-softmax-fusion",
    ),
}
"""By feature."""

COSTS_ON_CPU = {"gradient-accumulation-fusion", "grouped-gemm"}
"""They add the exact float32 product, and torch has no CPU matmul from bf16 into float32: here precision is what they are for."""


def _claim_case(feature: str) -> Callable[[Run], Paired]:
    claim = CLAIMS[feature]

    @case(
        f"claims.{feature}", feature=feature, metric="ratio", against="off", aim=1.0,
        must=None if feature in COSTS_ON_CPU else SLOWEST, preset="smoke" if feature == "flash-attention" else "standard",
    )  # fmt: skip
    def on_and_off(run: Run) -> Paired:
        """A training step, forward to optimizer, with the feature beside one without it; 2 layers, h=256, S=1024, bf16."""
        losses = {on: train_with(claim.flags(on), LENGTH).losses for on in (True, False)}
        error = max(abs(a - b) / abs(b) for a, b in zip(losses[True], losses[False], strict=True))
        return Paired(
            round=lambda: {
                "ours": train_with(claim.flags(True), LENGTH).seconds,
                "off": train_with(claim.flags(False), LENGTH).seconds,
            },
            check=Check(error, 1e-3, "losses of all steps"),
            workload={"on": claim.on, "off": claim.off, "published on NPU": claim.published, "situation": claim.situation},
        )

    return on_and_off


CASES = tuple(_claim_case(feature) for feature in CLAIMS)
