"""Matrix products on a CUDA device against the rate that its tensor cores reach: experts, weight gradients, attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._case import Floor, Peer, Run, Timing, case, operator_timing
from benchmarks.ops._cuda import BF16, BOTH_WAYS, CHECKED_ROWS, DEVICE, Measured, fraction, normal
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention
from mindspeed.ops.gmm import npu_gmm_v2
from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32


def grouped(sizes: list[int], inner: int, outer: int) -> Timing:
    def inputs(own: list[int]) -> tuple[Any, ...]:
        return normal(sum(own), inner, grad=False), normal(len(own), inner, outer, grad=False), torch.tensor(own, device="cuda")

    def loop(x: Tensor, weight: Tensor, own: Tensor) -> Tensor:
        return torch.cat([part @ weight[index] for index, part in enumerate(x.split(own.tolist()))])

    return operator_timing(
        lambda x, weight, own: npu_gmm_v2(x, weight, group_list=own), loop, lambda: inputs(sizes), mode="forward",
        peers={
            "loop": loop,
            "grouped_mm": lambda x, weight, own: F.grouped_mm(x, weight, offs=own.cumsum(0).to(torch.int32)),
        },
        floor=Floor(flops=2 * sum(sizes) * inner * outer, dtype=BF16),
        workload={"groups": len(sizes), "rows": sum(sizes), "inner": inner, "outer": outer},
        check_inputs=lambda: inputs([16, 0, 32]),
    )  # fmt: skip


class Accumulate:
    """Times the accumulation into a buffer that was copied before; `fn` is the same on a copy of its own, for the check."""

    reusable = True

    def __init__(self, step: Any) -> None:
        self.step = step
        self.fn = torch.no_grad()(lambda *values: self.call(*self.prepare(*values)))

    def prepare(self, *values: Any) -> tuple[Any, ...]:
        return *values[:-1], values[-1].detach().clone()

    def call(self, *values: Any) -> Any:
        with torch.no_grad():
            self.step(*values)
            return values[-1]


def accumulated(groups: int, rows: int, inner: int, outer: int) -> Timing:
    def inputs(count: int) -> tuple[Any, ...]:
        shape = (groups, inner, outer) if groups > 1 else (outer, inner)
        grad = torch.randn(*shape, device="cuda")
        return normal(count * groups, inner, grad=False), normal(count * groups, outer, grad=False), grad

    def ours(x: Tensor, dy: Tensor, grad: Tensor) -> None:
        if groups == 1:
            npu_matmul_add_fp32(x, dy, grad)
        else:
            ends = torch.arange(1, groups + 1, device="cuda") * (x.shape[0] // groups)
            npu_groupmatmul_add_fp32(x, dy, ends, grad)

    def plain(x: Tensor, dy: Tensor, grad: Tensor) -> None:
        if groups == 1:
            grad.add_(dy.t() @ x)
        else:
            grad.add_(x.unflatten(0, (groups, -1)).transpose(1, 2) @ dy.unflatten(0, (groups, -1)))

    plain_form = Accumulate(plain)
    declared = operator_timing(
        Accumulate(ours).fn, plain_form.fn, lambda: inputs(rows), mode="forward",
        floor=Floor(flops=2 * groups * rows * inner * outer, dtype=BF16),
        workload={"groups": groups, "rows": rows, "inner": inner, "outer": outer}, check_inputs=lambda: inputs(CHECKED_ROWS),
    )  # fmt: skip
    peer = Peer(make=lambda: plain_form, version=torch.__version__)
    return dataclasses.replace(declared, ours=Accumulate(ours), peers={"matmul and add": peer})


def attention(mode: str, positions: int) -> Timing:
    heads, groups, size = 32, 8, 128
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="cuda").triu(1)

    def inputs(count: int) -> tuple[Tensor, ...]:
        return tuple(normal(1, count, own, size) for own in (heads, groups, groups))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return npu_fusion_attention(q, k, v, heads, "BSND", atten_mask=mask, sparse_mode=2, scale=size**-0.5)[0]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (value.transpose(1, 2) for value in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    work = 2 if mode == "forward" else 5
    return operator_timing(
        ours, sdpa, lambda: inputs(positions), mode=mode, peers={"sdpa": sdpa},  # type: ignore[arg-type]
        floor=Floor(flops=work * positions**2 * size * heads, dtype=BF16),
        workload={"positions": positions, "heads": heads, "key_heads": groups, "mode": mode}, check_inputs=lambda: inputs(256),
    )  # fmt: skip


def _attention_case(mode: str, positions: int) -> Measured:
    name = f"ops.cuda.fusion_attention.{mode}.{positions}"

    @case(name, feature="fusion_attention", metric="ratio", against="sdpa", must=0.97, aim=0.99, **DEVICE)  # type: ignore[arg-type]
    def measured(run: Run) -> Timing:
        """Causal attention, 32 query heads, 8 key heads of 128, bfloat16, against torch's own call."""
        return attention(mode, positions)

    return measured


RAGGED = [0 if index % 4 == 3 else 256 * (1 + index % 7) for index in range(64)]


def _cases() -> Iterator[Measured]:
    for name, sizes, must, aim in (
        ("8x8192", [8192] * 8, 0.80, 0.90),
        ("64x1024", [1024] * 64, 0.78, 0.88),
        ("256x64", [64] * 256, 0.50, 0.70),
        ("ragged", RAGGED, 0.50, 0.70),
    ):
        yield fraction(
            f"gmm.{name}", f"Grouped product, {name} rows, 2048 -> 1408, bfloat16.", must, aim,
            lambda sizes=sizes: grouped(sizes, 2048, 1408),
        )  # fmt: skip
    yield fraction(
        "matmul_add.4096", "Weight gradient into float32, 16384 x 4096 x 14336, bfloat16.", 0.85, 0.92,
        lambda: accumulated(1, 16384, 4096, 14336),
    )  # fmt: skip
    yield fraction(
        "matmul_add.8192", "Weight gradient into float32, 8192 x 8192 x 28672, bfloat16.", 0.85, 0.92,
        lambda: accumulated(1, 8192, 8192, 28672),
    )  # fmt: skip
    yield fraction(
        "groupmatmul_add.8", "Weight gradients of 8 experts into float32, 8192 rows each, 2048 x 1408.", 0.85, 0.92,
        lambda: accumulated(8, 8192, 2048, 1408),
    )  # fmt: skip
    yield from (_attention_case(mode, positions) for mode in BOTH_WAYS for positions in (4096, 16384))


CASES = tuple(_cases())
