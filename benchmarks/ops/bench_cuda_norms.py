"""Norms on a CUDA device against the least time that memory allows, and the host time of a launch."""

# H hidden size

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._case import Check, Peer, Run, Timing, case, operator_timing
from benchmarks.ops._cuda import BF16, BOTH_WAYS, COMPILED, Measured, by_rows, compiled, fraction, liger, normal
from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm
from mindspeed.ops.layer_norm import layer_norm
from mindspeed.ops.rms_norm import rms_norm


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


@case(
    "ops.cuda.launch.rms_norm", feature="rms_norm", metric="ratio", against="torch.rms_norm", must=1 / 1.2, aim=1.0,
    devices=("cuda",), unit="CPU us",
)  # fmt: skip
def launch(run: Run) -> Timing:
    """Host time of one RMSNorm forward call of 64 rows of 1024, bfloat16, against torch's own."""
    inputs = lambda count: (normal(count, 1024), normal(1024))  # noqa: E731
    peers = {"torch.rms_norm": lambda x, gamma: F.rms_norm(x, (1024,), gamma, 1e-6)}
    return dataclasses.replace(by_rows(rms_norm, plain_rms, inputs, 64, "forward", 1, **peers), floor=None)


def _cases() -> Iterator[Measured]:
    for way in BOTH_WAYS:
        norm, drop = ((0.85, 0.92), (0.85, 0.92)) if way == "forward" else ((0.75, 0.85), (0.75, 0.85))
        for size, preset in ((1024, "full"), (4096, "standard"), (8192, "standard"), (16384, "full")):
            rows = (1 << 27) // size
            yield fraction(
                f"rms_norm.{way}.{size}", f"RMSNorm {way} of rows of {size}, bfloat16.", *norm,
                lambda way=way, rows=rows, size=size: rms(way, rows, size), preset=preset,
            )  # fmt: skip
        yield fraction(
            f"rms_norm.{way}.fp32_weight", f"RMSNorm {way}, bfloat16 rows of 8192, float32 weight.", *norm,
            lambda way=way: rms(way, 16384, 8192, torch.float32),
        )  # fmt: skip
        yield fraction(
            f"layer_norm.{way}.8192", f"LayerNorm {way} of rows of 8192, bfloat16.", *norm,
            lambda way=way: layer(way, 16384, 8192),
        )  # fmt: skip
        for size in (4096, 8192):
            yield fraction(
                f"add_rms_norm.{way}.{size}", f"Sum and RMSNorm {way} of rows of {size}, bfloat16.", *norm,
                lambda way=way, size=size: add_norm(way, (1 << 27) // size, size), feature="dropout_add_norm",
            )  # fmt: skip
        yield fraction(
            f"dropout_add_rms_norm.{way}.8192", f"Dropout, sum and RMSNorm {way} of rows of 8192, bfloat16.", *drop,
            lambda way=way: dropout_add_norm(way, 16384, 8192), feature="dropout_add_norm",
        )  # fmt: skip


CASES = tuple(_cases())
