"""Operators on a CUDA device against the least time that the device allows: two sizes each (LLaMA-8B-like and 70B-like), and launches.

Every case names its floor: bytes that must move or operations that must be done. The check runs on few rows of the same shape.
"""

# M rows, H hidden size, F feed-forward size, T tokens, K copies of a token, E experts, S positions, N heads, D head size

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._case import Check, Floor, Peer, Run, Timing, case, operator_timing
from benchmarks.ops.bench_adamw import InPlace, formula, formula_with_average, fresh
from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention
from mindspeed.ops.gmm import npu_gmm_v2
from mindspeed.ops.layer_norm import layer_norm
from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2
from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw
from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32
from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute
from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update
from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding
from mindspeed.ops.rms_norm import rms_norm
from mindspeed.ops.swiglu import swiglu

BF16 = torch.bfloat16
CHECKED_ROWS = 64
COMPILED = 8192  # row length at which torch.compile is a peer: every compilation costs seconds of the run
CASES: list[Callable[[Run], Timing]] = []
DEVICE = {"devices": ("cuda",), "unit": "device ms"}


def normal(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    """Fresh random numbers on the device."""
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def fraction(
    name: str, summary: str, must: float, aim: float, make: Callable[[], Timing], feature: str = "", preset: str = "standard"
) -> None:
    """Declare a case whose figure is floor / ours."""

    def measured(run: Run) -> Timing:
        return make()

    measured.__doc__ = summary
    owner = feature or name.partition(".")[0]
    CASES.append(
        case(f"ops.cuda.{name}", feature=owner, metric="fraction", must=must, aim=aim, preset=preset, **DEVICE)(measured)
    )  # type: ignore[arg-type]


def by_rows(fn: Any, reference: Any, inputs: Callable[[int], tuple], rows: int, mode: str, nbytes: int, **peers: Any) -> Timing:
    """A `Timing` of a streaming operator; `inputs(rows)` makes its arguments."""
    return operator_timing(
        fn, reference, lambda: inputs(rows), mode=mode, peers={"eager": reference, **peers}, floor=Floor(bytes=nbytes),
        workload={"rows": rows, "mode": mode}, check_inputs=lambda: inputs(CHECKED_ROWS),
    )  # fmt: skip


def compiled(function: Any) -> Peer:
    return Peer(make=lambda: torch.compile(function, dynamic=False), version=torch.__version__)


def liger(path: str, attribute: str) -> Peer:
    """A function of Liger-Kernel, where it is installed."""

    def make() -> Any:
        import importlib

        return getattr(importlib.import_module(f"liger_kernel.ops.{path}"), attribute).apply

    return Peer(make=make, version="liger-kernel")


# ---- norms


def plain_rms(x: Tensor, gamma: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)) * gamma).to(x.dtype)


def plain_layer(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gamma, beta)


def rms(mode: str, rows: int, hidden: int, weight: torch.dtype = BF16) -> Timing:
    nbytes = (2 if mode == "forward" else 3) * rows * hidden * 2
    peers: dict[str, Any] = {"torch.compile": compiled(plain_rms)} if hidden == COMPILED else {}
    if weight == BF16:
        peers["torch.rms_norm"] = lambda x, gamma: F.rms_norm(x, (hidden,), gamma, 1e-6)
        peers["liger"] = Peer(make=lambda: _liger_rms(liger("rms_norm", "LigerRMSNormFunction")))
    inputs = lambda count: (normal(count, hidden), normal(hidden, dtype=weight))  # noqa: E731
    return by_rows(rms_norm, plain_rms, inputs, rows, mode, nbytes, **peers)


def _liger_rms(peer: Peer) -> Any:
    function = peer.make()
    return lambda x, gamma: function(x, gamma, 1e-6)


def layer(mode: str, rows: int, hidden: int) -> Timing:
    nbytes = (2 if mode == "forward" else 3) * rows * hidden * 2
    inputs = lambda count: (normal(count, hidden), normal(hidden), normal(hidden))  # noqa: E731
    return by_rows(layer_norm, plain_layer, inputs, rows, mode, nbytes, **{"torch.compile": compiled(plain_layer)})


def ours_add(x: Tensor, residual: Tensor, gamma: Tensor) -> Any:
    return npu_dropout_add_rms_norm(x, residual, gamma, None, 0.0, 1e-6, prenorm=True)


def plain_add(x: Tensor, residual: Tensor, gamma: Tensor) -> Any:
    total = x + residual
    return plain_rms(total, gamma), total


def add_norm(mode: str, rows: int, hidden: int) -> Timing:
    inputs = lambda count: (normal(count, hidden), normal(count, hidden), normal(hidden))  # noqa: E731
    peers = {"torch.compile": compiled(plain_add)} if hidden == COMPILED else {}
    return by_rows(ours_add, plain_add, inputs, rows, mode, 4 * rows * hidden * 2, **peers)


def dropout_add_norm(mode: str, rows: int, hidden: int) -> Timing:
    """Checked without dropout, where there is a truth; the mask has tests of its own."""
    ours = lambda x, residual, gamma: npu_dropout_add_rms_norm(x, residual, gamma, None, 0.1, 1e-6, prenorm=True)  # noqa: E731
    plain = lambda x, residual, gamma: plain_add(F.dropout(x, 0.1), residual, gamma)  # noqa: E731
    declared = add_norm(mode, rows, hidden)
    timed = operator_timing(ours, plain, declared.inputs, mode=mode)  # type: ignore[arg-type]
    unchecked = Check(0.0, 0.0, "random")
    return dataclasses.replace(
        declared, ours=timed.ours, peers={},
        check=lambda contender: declared.check(declared.ours) if contender is timed.ours else unchecked,
    )  # fmt: skip


for _way in ("forward", "backward"):
    _norm, _drop = ((0.85, 0.92), (0.85, 0.92)) if _way == "forward" else ((0.75, 0.85), (0.75, 0.85))
    for _size, _preset in ((1024, "full"), (4096, "standard"), (8192, "standard"), (16384, "full")):
        _rows = (1 << 27) // _size
        fraction(
            f"rms_norm.{_way}.{_size}", f"RMSNorm {_way} of rows of {_size}, bfloat16.", *_norm,
            lambda way=_way, rows=_rows, size=_size: rms(way, rows, size), preset=_preset,
        )  # fmt: skip
    fraction(f"rms_norm.{_way}.fp32_weight", f"RMSNorm {_way}, bfloat16 rows of 8192, float32 weight.", *_norm,
             lambda way=_way: rms(way, 16384, 8192, torch.float32))  # fmt: skip
    fraction(f"layer_norm.{_way}.8192", f"LayerNorm {_way} of rows of 8192, bfloat16.", *_norm,
             lambda way=_way: layer(way, 16384, 8192))  # fmt: skip
    for _size in (4096, 8192):
        fraction(f"add_rms_norm.{_way}.{_size}", f"Sum and RMSNorm {_way} of rows of {_size}, bfloat16.", *_norm,
                 lambda way=_way, size=_size: add_norm(way, (1 << 27) // size, size), feature="dropout_add_norm")  # fmt: skip
    fraction(f"dropout_add_rms_norm.{_way}.8192", f"Dropout, sum and RMSNorm {_way} of rows of 8192, bfloat16.", *_drop,
             lambda way=_way: dropout_add_norm(way, 16384, 8192), feature="dropout_add_norm")  # fmt: skip


# ---- activation and rotation


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = (half if half.dtype == torch.float64 else half.float() for half in x.chunk(2, -1))
    return (F.silu(gate) * up).to(x.dtype)


def gated(mode: str, rows: int, size: int) -> Timing:
    nbytes = (3 if mode == "forward" else 5) * rows * size * 2
    return by_rows(swiglu, plain_swiglu, lambda count: (normal(count, 2 * size),), rows, mode, nbytes,
                   **{"torch.compile": compiled(plain_swiglu)})  # fmt: skip


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


for _way in ("forward", "backward"):
    for _size in (14336, 28672):
        fraction(f"swiglu.{_way}.{_size}", f"SwiGLU {_way} to rows of {_size}, bfloat16.", 0.88, 0.94,
                 lambda way=_way, size=_size: gated(way, (1 << 27) // size, size))  # fmt: skip
    for _kind, _packed in ((False, 32), (True, 32), (False, 40)):
        _name = ("interleaved" if _kind else "half") + (".packed" if _packed == 40 else "")
        fraction(f"rotary.{_name}.{_way}", f"Rotary embedding ({_name}) {_way}, {_packed} heads of 128, bfloat16.", 0.82, 0.92,
                 lambda way=_way, kind=_kind, heads=_packed: rotary(way, kind, heads))  # fmt: skip


# ---- optimizers


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


fraction("adamw.fp32", "AdamW step of 128 Mi float32 parameters.", 0.85, 0.93, lambda: step_timing(adamw, formula, 4, 28))
fraction("ema_adamw.fp32", "AdamW step with moving average of 128 Mi float32 parameters.", 0.85, 0.93,
         lambda: step_timing(ema, formula_with_average, 5, 36))  # fmt: skip


# ---- experts


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


RAGGED = [0 if index % 4 == 3 else 256 * (1 + index % 7) for index in range(64)]
for _name, _sizes, _must, _aim in (
    ("8x8192", [8192] * 8, 0.80, 0.90),
    ("64x1024", [1024] * 64, 0.78, 0.88),
    ("256x64", [64] * 256, 0.50, 0.70),
    ("ragged", RAGGED, 0.50, 0.70),
):
    fraction(f"gmm.{_name}", f"Grouped product, {_name} rows, 2048 -> 1408, bfloat16.", _must, _aim,
             lambda sizes=_sizes: grouped(sizes, 2048, 1408))  # fmt: skip
for _size in (4096, 8192):
    fraction(f"permute.{_size}", f"Copies of tokens of {_size} to 2 experts each, bfloat16.", 0.75, 0.88,
             lambda size=_size: moved(size, True), feature="moe_token_permute")  # fmt: skip
    fraction(f"unpermute.{_size}", f"Weighted sum of 2 expert results per token of {_size}, bfloat16.", 0.75, 0.88,
             lambda size=_size: moved(size, False), feature="moe_token_permute")  # fmt: skip


# ---- weight gradients


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


fraction("matmul_add.4096", "Weight gradient into float32, 16384 x 4096 x 14336, bfloat16.", 0.85, 0.92,
         lambda: accumulated(1, 16384, 4096, 14336))  # fmt: skip
fraction("matmul_add.8192", "Weight gradient into float32, 8192 x 8192 x 28672, bfloat16.", 0.85, 0.92,
         lambda: accumulated(1, 8192, 8192, 28672))  # fmt: skip
fraction("groupmatmul_add.8", "Weight gradients of 8 experts into float32, 8192 rows each, 2048 x 1408.", 0.85, 0.92,
         lambda: accumulated(8, 8192, 2048, 1408))  # fmt: skip


# ---- attention


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


def _attention_case(mode: str, positions: int) -> Callable[[Run], Timing]:
    name = f"ops.cuda.fusion_attention.{mode}.{positions}"

    @case(name, feature="fusion_attention", metric="ratio", against="sdpa", must=0.97, aim=0.99, **DEVICE)  # type: ignore[arg-type]
    def measured(run: Run) -> Timing:
        """Causal attention, 32 query heads, 8 key heads of 128, bfloat16, against torch's own call."""
        return attention(mode, positions)

    return measured


CASES += [_attention_case(mode, positions) for mode in ("forward", "backward") for positions in (4096, 16384)]


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


for _positions in (8192, 16384):
    fraction(f"ring_attention_update.{_positions}", f"Merge of two attention results, {_positions} positions, 32 heads of 128.",
             0.80, 0.90, lambda positions=_positions: ring(positions, 32))  # fmt: skip


# ---- launches


@case(
    "ops.cuda.launch.rms_norm", feature="rms_norm", metric="ratio", against="torch.rms_norm", must=1 / 1.2, aim=1.0,
    devices=("cuda",), unit="CPU us",
)  # fmt: skip
def launch(run: Run) -> Timing:
    """Host time of one RMSNorm forward call of 64 rows of 1024, bfloat16, against torch's own."""
    inputs = lambda count: (normal(count, 1024), normal(1024))  # noqa: E731
    peers = {"torch.rms_norm": lambda x, gamma: F.rms_norm(x, (1024,), gamma, 1e-6)}
    return dataclasses.replace(by_rows(rms_norm, plain_rms, inputs, 64, "forward", 1, **peers), floor=None)


MEASURED = tuple(CASES)
