"""Attention on one device: time and memory beside the host and the bare kernel, and scores visited beside scores seen."""

# B batch 1, N heads, D head size, S sequence; tensors are [S, B, N, D] as the host's layers have them

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._case import Check, Counted, Paired, Run, Timing, case, operator_timing
from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.plan import ContextPlan
from mindspeed.core.context_parallel.tiles import visible_entries
from mindspeed.core.context_parallel.work import AttentionOptions

N, D = 8, 64
SCALE = 1 / math.sqrt(D)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout | None = None, **options: Any) -> Tensor:
    """What `--use-flash-attn` computes on one device."""
    layout = layout or SequenceLayout(q.shape[0])
    return context_attention(
        q, k, v, plan=ContextPlan(), groups=ContextGroups(), layout=layout, options=AttentionOptions(SCALE, **options)
    )


def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own call of the same kernel."""
    out = F.scaled_dot_product_attention(*(tensor.permute(1, 2, 0, 3) for tensor in (q, k, v)), is_causal=True, scale=SCALE)
    return out.permute(2, 0, 1, 3)


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every score in memory."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    weights = (SCALE * q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3)


def draw(length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random q, k, v that want gradients."""
    return tuple(torch.randn(length, 1, N, D).to(dtype).requires_grad_() for _ in range(3))


def _workload(length: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"batch": 1, "heads": N, "head size": D, "seq": length, "dtype": str(dtype).removeprefix("torch."), "mask": "causal"}


# ---- beside the host ----------------------------------------------------------------------------------------------------


def _beside_host(length: int, dtype: torch.dtype) -> Paired:
    """Forward and backward, CPU seconds; both on the same inputs in every round."""
    inputs = draw(length, dtype)
    with _host_attention(dtype) as host:
        ours, theirs = (_with_gradients(function, inputs) for function in (attention, host))
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))

    def round_() -> dict[str, float]:
        fresh = draw(length, dtype)
        with _host_attention(dtype) as host:
            return {"ours": _seconds(attention, fresh), "host": _seconds(host, fresh)}

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return Paired(
        round=round_,
        check=Check(error, tolerance, "relative norm of the difference of output and gradients"),
        workload=_workload(length, dtype),
    )


@contextlib.contextmanager
def _host_attention(dtype: torch.dtype) -> Any:
    """The host's unfused core attention, the device retargeted and no feature on."""
    import mindspeed

    with mindspeed.enabled(), contextlib.redirect_stdout(io.StringIO()):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        parallel_state.initialize_model_parallel()
        try:
            model_parallel_cuda_manual_seed(1)
            config = TransformerConfig(
                num_layers=1, hidden_size=N * D, num_attention_heads=N, attention_dropout=0.0, params_dtype=dtype,
                bf16=dtype == torch.bfloat16, attention_softmax_in_fp32=False, masked_softmax_fusion=True,
            )  # fmt: skip
            module = DotProductAttention(config, 1, AttnMaskType.causal, "self")
            yield lambda q, k, v: module(q, k, v, None, AttnMaskType.causal).view(q.shape)
        finally:
            parallel_state.destroy_model_parallel()


def _with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out = function(*inputs)
    return [value.detach().float() for value in (out, *torch.autograd.grad(out, inputs, torch.ones_like(out)))]


def _seconds(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """CPU seconds of forward and backward, the second of two."""
    grad = torch.randn_like(inputs[0])
    for _ in range(2):
        start = time.process_time()
        torch.autograd.grad(function(*inputs), inputs, grad)
        spent = time.process_time() - start
    return spent


@case("attn.flash.cpu.1k.bf16", feature="flash-attention", metric="ratio", against="host", must=3.0, aim=5.0, preset="smoke")
def flash_1k_bf16(run: Run) -> Paired:
    """Forward and backward beside the host's unfused attention, S=1024 bf16."""
    return _beside_host(1024, torch.bfloat16)


@case("attn.flash.cpu.2k.bf16", feature="flash-attention", metric="ratio", against="host", must=4.0, aim=7.0)
def flash_2k_bf16(run: Run) -> Paired:
    """The same at S=2048 bf16."""
    return _beside_host(2048, torch.bfloat16)


@case("attn.flash.cpu.2k.fp32", feature="flash-attention", metric="ratio", against="host", must=4.0, aim=7.0)
def flash_2k_fp32(run: Run) -> Paired:
    """The same at S=2048 fp32."""
    return _beside_host(2048, torch.float32)


@case("attn.flash.cpu.4k.bf16", feature="flash-attention", metric="ratio", against="host", must=4.0, aim=7.0, preset="full")
def flash_4k_bf16(run: Run) -> Paired:
    """The same at S=4096 bf16."""
    return _beside_host(4096, torch.bfloat16)


@case("attn.flash.cpu.4k.fp32", feature="flash-attention", metric="ratio", against="host", must=4.0, aim=7.0, preset="full")
def flash_4k_fp32(run: Run) -> Paired:
    """The same at S=4096 fp32."""
    return _beside_host(4096, torch.float32)


# ---- beside the bare kernel ----------------------------------------------------------------------------------------------


def _beside_aten(length: int, dtype: torch.dtype) -> Timing:
    return operator_timing(
        attention, textbook, partial(draw, length, dtype), peers={"aten": bare}, workload=_workload(length, dtype),
        check_inputs=partial(draw, 256, dtype), slack=3.0,
    )  # fmt: skip


@case("attn.flash.wrapper.bf16", feature="flash-attention", metric="ratio", against="aten", must=0.95, aim=0.98)
def wrapper_bf16(run: Run) -> Timing:
    """What tiles, merging and saving cost over torch's own call of the kernel, S=2048 bf16."""
    return _beside_aten(2048, torch.bfloat16)


@case("attn.flash.wrapper.fp32", feature="flash-attention", metric="ratio", against="aten", must=0.95, aim=0.98)
def wrapper_fp32(run: Run) -> Timing:
    """The same in fp32."""
    return _beside_aten(2048, torch.float32)


@case("attn.saved", feature="flash-attention", metric="fraction", better="equal", must=1.0, unit="bytes", preset="smoke")
def saved(run: Run) -> Counted:
    """Bytes kept for backward beside q, k, v, out and the log-sum-exp, S=1024 bf16."""
    from mindspeed.testing import saved_bytes

    q, k, v = draw(1024, torch.bfloat16)
    with saved_bytes() as kept:
        out = attention(q, k, v)
    floor = sum(tensor.numel() * tensor.element_size() for tensor in (q, k, v, out)) + out.numel() // D * 4
    error = (out.float() - textbook(q.float(), k.float(), v.float())).norm() / out.float().norm()
    return Counted(ours=kept.bytes, floor=floor, check=Check(error.item(), 1e-2), workload=_workload(1024, torch.bfloat16))


# ---- scores visited ------------------------------------------------------------------------------------------------------


class Visits(TorchDispatchMode):
    """Counts the scores that the CPU kernel computes: its causal form skips the upper triangle."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            queries, keys = args[0].shape[2], args[1].shape[2]
            causal = args[4] if len(args) > 4 else False
            self.scores += args[0].shape[0] * (queries * (queries + 1) // 2 if causal else queries * keys)
        return func(*args, **(kwargs or {}))


def _visits(layout: SequenceLayout, slopes: Tensor | None = None) -> Counted:
    q, k, v = (torch.randn(layout.length, 1, 1, 8) for _ in range(3))
    with Visits() as visits:
        out = attention(q, k, v, layout, slopes=slopes)
    from mindspeed.core.context_parallel.layout import tiles_between

    blocks = layout.block(0, 0)
    visible = visible_entries(tiles_between(blocks, blocks, layout.rule(0), slopes is None))
    return Counted(
        ours=visits.scores, floor=visible, check=Check(0.0 if torch.isfinite(out).all() else math.nan, 0.0),
        workload={"seq": layout.length, "past": layout.past, "documents": len(layout.boundaries[0]) - 1 if layout.boundaries else 1},
    )  # fmt: skip


def _visit_case(name: str) -> Callable[[Callable[[Run], Counted]], Callable[[Run], Counted]]:
    return case(
        f"attn.masks.{name}", feature="alibi" if name == "alibi" else "flash-attention", metric="fraction",
        must=1 / 1.15, aim=1 / 1.05, unit="scores", preset="smoke",
    )  # fmt: skip


@_visit_case("causal")
def masks_causal(run: Run) -> Counted:
    """Scores computed beside scores visible, causal."""
    return _visits(SequenceLayout(4096))


@_visit_case("band")
def masks_band(run: Run) -> Counted:
    """The same with a band of 1024 keys; narrower ones visit more, since calls get 256 rows."""
    return _visits(SequenceLayout(4096, past=1023))


@_visit_case("documents")
def masks_documents(run: Run) -> Counted:
    """The same with eight documents."""
    return _visits(SequenceLayout(4096, boundaries=((0, 200, 900, 1000, 1777, 2500, 2600, 3900, 4096),)))


@_visit_case("alibi")
def masks_alibi(run: Run) -> Counted:
    """The same with ALiBi, causal."""
    return _visits(SequenceLayout(4096), torch.tensor([0.5]))
