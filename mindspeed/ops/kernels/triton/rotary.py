"""Rotary embedding in Triton: tiles of rows, pairs side by side; one kernel serves forward, backward and partial rotation."""

# D head size, R rotated part of it; a row is one head of one token

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops.kernels.triton._launch import Build, triton_body

TILE = 2048
"""Elements of one tile of pairs."""


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, rows, size_1, size_2, head, half,
    x_0, x_1, x_2, cos_0, cos_1, cos_2, sin_0, sin_1, sin_2,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    index_2 = row % size_2
    index_1 = (row // size_2) % size_1
    index_0 = row // size_2 // size_1
    x_row = (x_ptr + index_0 * x_0 + index_1 * x_1 + index_2 * x_2)[:, None]
    cos_row = (cos_ptr + index_0 * cos_0 + index_1 * cos_1 + index_2 * cos_2)[:, None]
    sin_row = (sin_ptr + index_0 * sin_0 + index_1 * sin_1 + index_2 * sin_2)[:, None]
    y_row = (y_ptr + row * head)[:, None]

    pair = tl.arange(0, PAIRS)[None, :]
    live = inside[:, None] & (pair < half)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half
    a = tl.load(x_row + first, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_row + second, mask=live, other=0.0).to(tl.float32)
    cos_a = tl.load(cos_row + first, mask=live, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_row + second, mask=live, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_row + first, mask=live, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_row + second, mask=live, other=0.0).to(tl.float32)
    if BACKWARD:  # the transposed turn: each partner's own sine comes with it
        tl.store(y_row + first, a * cos_a + b * sin_b, mask=live)
        tl.store(y_row + second, b * cos_b - a * sin_a, mask=live)
    else:
        tl.store(y_row + first, a * cos_a - b * sin_a, mask=live)
        tl.store(y_row + second, b * cos_b + a * sin_b, mask=live)
    if TAIL > 0:
        tail = 2 * half + tl.arange(0, TAIL)[None, :]
        beyond = inside[:, None] & (tail < head)
        tl.store(y_row + tail, tl.load(x_row + tail, mask=beyond, other=0.0), mask=beyond)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, mode: int, backward: bool) -> Tensor:
    x, cos, sin = (value if value.stride(-1) == 1 else value.contiguous() for value in (x, cos, sin))
    head, half = x.shape[-1], cos.shape[-1] // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = (value.expand(*x.shape[:3], 2 * half) for value in (cos, sin))
    rows = x.numel() // head
    pairs = triton.next_power_of_2(half)
    tile = max(1, TILE // pairs)
    tail = head - 2 * half
    _rotate[(triton.cdiv(rows, tile),)](
        x, cos, sin, y, rows, x.shape[1], x.shape[2], head, half, *x.stride()[:3], *cos.stride()[:3], *sin.stride()[:3],
        INTERLEAVED=mode == 1, BACKWARD=backward, ROWS=tile, PAIRS=pairs, TAIL=triton.next_power_of_2(tail) if tail else 0,
    )  # fmt: skip
    return y


def _no_angles(cos: Tensor) -> str | None:
    return "nothing to rotate" if cos.shape[-1] == 0 else None


@triton_body("rotary", declines=lambda x, cos, sin, mode: _no_angles(cos))
def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    """Forward."""
    return _launch(x, cos, sin, mode, backward=False)


def _declines_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, mode: int) -> str | None:
    return _no_angles(cos) if x is None else "cos or sin wants a gradient"


@triton_body("rotary_backward", declines=_declines_backward)
def rotary_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x; those of cos and sin are left to the plain form."""
    return _launch(dy, cos, sin, mode, backward=True), cos.new_empty(0), cos.new_empty(0)


_TYPES = "*bf16 *fp32 *fp32 *bf16 i64 i32 i32 i32 i32" + " i64" * 9
BUILDS = tuple(
    Build(_rotate, _TYPES, {"INTERLEAVED": interleaved, "BACKWARD": interleaved, "ROWS": 32, "PAIRS": 64, "TAIL": tail})
    for interleaved, tail in ((False, 0), (True, 64))
)
