"""Cross entropy of a large vocabulary, forward and backward; what it keeps, and its collectives where the vocabulary is split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._case import Check, Counted, Floor, Run, Timing, case, operator_timing
from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy
from mindspeed.testing.operators import counted_collectives, kept_bytes
from mindspeed.testing.pool import pools

ROWS, VOCABULARY = 2048, 32768
KEPT_ROWS = 64


def eager(logits: Tensor, target: Tensor) -> Tensor:
    """torch's own loss, which is faster than the host's formula."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target, reduction="none")


def hosts_formula(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    shifted = wide - wide.amax(-1, keepdim=True)
    return shifted.exp().sum(-1).log() - shifted.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def drawn(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, VOCABULARY).to(dtype).requires_grad_(), torch.randint(0, VOCABULARY, (rows,))


def timing(rows: int, dtype: torch.dtype) -> Timing:
    return operator_timing(
        vocab_parallel_cross_entropy,
        eager,
        lambda: drawn(rows, dtype),
        peers={"eager": eager, "host's formula": hosts_formula, "torch.compile": torch.compile(eager)},
        floor=Floor(bytes=3 * rows * VOCABULARY * dtype.itemsize),
        workload={"rows": rows, "vocabulary": VOCABULARY, "dtype": str(dtype)},
        check_inputs=lambda: drawn(64, dtype),
    )


def rows(run: Run) -> int:
    return 256 if run.preset == "smoke" else ROWS


@case(
    "ops.cross_entropy.bf16",
    feature="cross-entropy-loss-fusion",
    metric="ratio",
    against="eager",
    must=2.5,
    aim=4.0,
    preset="smoke",
)
def bf16(run: Run) -> Timing:
    """Cross entropy, both ways, bfloat16."""
    return timing(rows(run), torch.bfloat16)


@case("ops.cross_entropy.fp32", feature="cross-entropy-loss-fusion", metric="ratio", against="eager", must=1.5, aim=2.5)
def fp32(run: Run) -> Timing:
    """Cross entropy, both ways, float32."""
    return timing(rows(run), torch.float32)


@case(
    "ops.cross_entropy.bf16.compile", feature="cross-entropy-loss-fusion", metric="ratio", against="torch.compile", must=0.8, aim=1.0,
)  # fmt: skip
def against_compile(run: Run) -> Timing:
    """Cross entropy, both ways, bfloat16, against torch.compile."""
    return timing(rows(run), torch.bfloat16)


@case(
    "ops.cross_entropy.kept", feature="cross-entropy-loss-fusion", metric="fraction", better="equal", must=1.0, unit="bytes",
)  # fmt: skip
def kept(run: Run) -> Counted:
    """Bytes kept for backward: logits in bfloat16, targets, and two numbers a row."""
    logits, target = drawn(KEPT_ROWS)
    found = {
        name: kept_bytes(lambda f=f: f(logits, target))
        for name, f in (("ours", vocab_parallel_cross_entropy), ("eager", eager))
    }
    error = (vocab_parallel_cross_entropy(logits, target) - eager(logits, target)).abs().max().item()
    return Counted(
        ours=found.pop("ours"), floor=KEPT_ROWS * (2 * VOCABULARY + 8 + 8), peers=found, check=Check(error, 1e-5, "loss"),
        workload={"rows": KEPT_ROWS, "vocabulary": VOCABULARY, "dtype": "bfloat16"},
    )  # fmt: skip


def _collectives(world: Any) -> tuple[int, int, float]:
    """Calls of ours and of the host's unfused loss, and the difference of the losses."""
    import mindspeed

    generator = torch.Generator().manual_seed(1)
    whole, target = torch.randn(8, 64, generator=generator), torch.randint(0, 64, (8,), generator=generator)
    mine = whole.chunk(world.size, -1)[world.rank].contiguous().requires_grad_()
    with counted_collectives() as ours:
        loss = vocab_parallel_cross_entropy(mine, target, world.group)
        loss.sum().backward()
    with mindspeed.enabled():
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(world.size)
        try:
            with counted_collectives() as host:
                theirs = tensor_parallel.vocab_parallel_cross_entropy(mine.detach().clone(), target)
        finally:
            parallel_state.destroy_model_parallel()
    return len(ours), len(host), (loss.detach() - theirs).abs().max().item()


@case(
    "ops.cross_entropy.calls", feature="cross-entropy-loss-fusion", metric="fraction", better="equal", must=1.0, unit="calls",
)  # fmt: skip
def calls(run: Run) -> Counted:
    """Collectives of forward and backward with the vocabulary split over two ranks; the host's unfused loss has three."""
    ours, host, error = pools().get(2, megatron=True).run(_collectives)[0]
    return Counted(
        ours=ours, floor=2, peers={"host": host}, check=Check(error, 1e-5, "loss"), workload={"ranks": 2, "rows": 8, "vocabulary": 64},
    )  # fmt: skip
