"""Other operators on a CUDA device that only move memory: activation, loss, rotation, optimizers, tokens, merged attention."""

# S positions, B samples, N heads, D head size

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._case import Floor, Timing, operator_timing
from benchmarks.ops._cuda import BF16, BOTH_WAYS, Measured, by_rows, compiled, fraction, normal
from benchmarks.ops.bench_adamw import InPlace, formula, formula_with_average, fresh
from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy
from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2
from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw
from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute
from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update
from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding
from mindspeed.ops.swiglu import swiglu


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = (half if half.dtype == torch.float64 else half.float() for half in x.chunk(2, -1))
    return (F.silu(gate) * up).to(x.dtype)


def gated(mode: str, rows: int, size: int) -> Timing:
    nbytes = (3 if mode == "forward" else 5) * rows * size * 2
    return by_rows(swiglu, plain_swiglu, lambda count: (normal(count, 2 * size),), rows, mode, nbytes,
                   **{"torch.compile": compiled(plain_swiglu)})  # fmt: skip


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target, reduction="none")


def loss(mode: str, rows: int, vocabulary: int) -> Timing:
    """Forward reads the logits once; backward reads them again and writes their gradient."""
    nbytes = (1 if mode == "forward" else 2) * rows * vocabulary * 2
    draw = lambda count: (normal(count, vocabulary), torch.randint(0, vocabulary, (count,), device="cuda"))  # noqa: E731
    return by_rows(
        vocab_parallel_cross_entropy, plain_loss, draw, rows, mode, nbytes, **{"torch.compile": compiled(plain_loss)}
    )


def plain_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def plain_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin).to(x.dtype)


def rotary(mode: str, interleaved: bool, heads: int) -> Timing:
    """Layout [S, B, N, D] with D 128; the packed form has the heads of query and key side by side in one tensor."""
    positions, plain = 16384, plain_interleaved if interleaved else plain_half

    def inputs(count: int) -> tuple[Tensor, ...]:
        angles = torch.rand(count, 1, 1, 128, device="cuda")
        return normal(count, 1, heads, 128), angles.cos().to(BF16), angles.sin().to(BF16)

    ours = lambda x, cos, sin: npu_rotary_position_embedding(x, cos, sin, int(interleaved))  # noqa: E731
    return by_rows(ours, plain, inputs, positions, mode, 2 * positions * heads * 128 * 2, **{"torch.compile": compiled(plain)})


def step_timing(step: Any, truth: Any, tensors: int, nbytes: int, parameter: torch.dtype = torch.float32) -> Timing:
    count, number = 1 << 27, torch.tensor([3], device="cuda")

    def inputs(size: int) -> tuple[Tensor, ...]:
        first = torch.rand(size, device="cuda").to(parameter)
        return first, *(torch.rand(size, device="cuda") for _ in range(tensors - 1))

    update = lambda *values: step(number, *values)  # noqa: E731
    declared = operator_timing(
        fresh(update), truth, lambda: inputs(count), mode="forward", floor=Floor(bytes=nbytes * count),
        workload={"parameters": count}, check_inputs=lambda: inputs(4096),
    )  # fmt: skip
    return dataclasses.replace(declared, ours=InPlace(update))


def adamw(number: Tensor, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Any:
    npu_apply_fused_adamw_v2(p, g, m, v, None, number, lr=1e-3, weight_decay=0.1)
    return p, m, v


def ema(number: Tensor, p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor) -> Any:
    return npu_apply_fused_ema_adamw(g, p, m, v, s, number, lr=1e-3, weight_decay=0.1)


def moved(hidden: int, forward: bool) -> Timing:
    copies, tokens = 2, (1 << 27) // hidden // 2

    def permuting(count: int) -> tuple[Any, ...]:
        return normal(count, hidden), torch.randint(0, 64, (count, copies), device="cuda")

    def returning(count: int) -> tuple[Any, ...]:
        order = torch.randperm(count * copies, device="cuda").int()
        return normal(count * copies, hidden), order, torch.rand(count, copies, device="cuda").requires_grad_()

    plain_permute = lambda x, index: x[torch.argsort(index.flatten(), stable=True) // copies]  # noqa: E731
    plain_return = lambda x, order, p: (  # noqa: E731
        (x[order.long()].view(*p.shape, -1).to(torch.promote_types(x.dtype, p.dtype)) * p.unsqueeze(-1)).sum(1).to(x.dtype)
    )
    ours = (lambda x, index: npu_moe_token_permute(x, index)[0]) if forward else npu_moe_token_unpermute
    plain, inputs = (plain_permute, permuting) if forward else (plain_return, returning)
    return by_rows(ours, plain, inputs, tokens, "forward", tokens * (1 + copies) * hidden * 2)


def ring(positions: int, heads: int) -> Timing:
    def inputs(count: int) -> tuple[Tensor, ...]:
        parts = ()
        for _ in range(2):
            top, total = (torch.rand(1, heads, count, 1, device="cuda").expand(-1, -1, -1, 8).contiguous() for _ in range(2))
            parts += normal(count, 1, heads * 128, grad=False), top, total + 1
        return parts

    def plain(out_a: Tensor, top_a: Tensor, sum_a: Tensor, out_b: Tensor, top_b: Tensor, sum_b: Tensor) -> Any:
        top = torch.maximum(top_a, top_b)
        part_a, part_b = sum_a * (top_a - top).exp(), sum_b * (top_b - top).exp()
        weights = (part / (part_a + part_b) for part in (part_a, part_b))
        a, b = (weight[0, :, :, 0].t()[:, None, :, None] for weight in weights)
        out = a * out_a.unflatten(-1, (heads, -1)) + b * out_b.unflatten(-1, (heads, -1))
        return out.flatten(2).to(out_a.dtype), top, part_a + part_b

    nbytes = 3 * positions * heads * 128 * 2 + 6 * positions * heads * 8 * 4
    ours, plain = torch.no_grad()(npu_ring_attention_update), torch.no_grad()(plain)  # neither has a derivative
    return by_rows(ours, plain, inputs, positions, "forward", nbytes, **{"torch.compile": compiled(plain)})


def _cases() -> Iterator[Measured]:
    for way in BOTH_WAYS:
        for size in (14336, 28672):
            yield fraction(
                f"swiglu.{way}.{size}", f"SwiGLU {way} to rows of {size}, bfloat16.", 0.88, 0.94,
                lambda way=way, size=size: gated(way, (1 << 27) // size, size),
            )  # fmt: skip
        for rows, vocabulary in ((1024, 32000), (8192, 32000), (16384, 128256)):
            yield fraction(
                f"cross_entropy.{way}.{rows}x{vocabulary}", f"Cross entropy {way}, {rows} tokens, vocabulary of {vocabulary}, bfloat16.",
                0.80, 0.90, lambda way=way, rows=rows, vocabulary=vocabulary: loss(way, rows, vocabulary),
                feature="cross-entropy-loss-fusion",
            )  # fmt: skip
        for kind, packed in ((False, 32), (True, 32), (False, 40)):
            name = ("interleaved" if kind else "half") + (".packed" if packed == 40 else "")
            yield fraction(
                f"rotary.{name}.{way}", f"Rotary embedding ({name}) {way}, {packed} heads of 128, bfloat16.", 0.82, 0.92,
                lambda way=way, kind=kind, heads=packed: rotary(way, kind, heads),
            )  # fmt: skip
    yield fraction(
        "adamw.fp32", "AdamW step of 128 Mi float32 parameters.", 0.85, 0.93, lambda: step_timing(adamw, formula, 4, 28)
    )
    yield fraction(
        "ema_adamw.fp32", "AdamW step with moving average of 128 Mi float32 parameters.", 0.85, 0.93,
        lambda: step_timing(ema, formula_with_average, 5, 36),
    )  # fmt: skip
    for size in (4096, 8192):
        yield fraction(
            f"permute.{size}", f"Copies of tokens of {size} to 2 experts each, bfloat16.", 0.75, 0.88,
            lambda size=size: moved(size, True), feature="moe_token_permute",
        )  # fmt: skip
        yield fraction(
            f"unpermute.{size}", f"Weighted sum of 2 expert results per token of {size}, bfloat16.", 0.75, 0.88,
            lambda size=size: moved(size, False), feature="moe_token_permute",
        )  # fmt: skip
    for positions in (8192, 16384):
        yield fraction(
            f"ring_attention_update.{positions}", f"Merge of two attention results, {positions} positions, 32 heads of 128.",
            0.80, 0.90, lambda positions=positions: ring(positions, 32),
        )  # fmt: skip


CASES = tuple(_cases())
