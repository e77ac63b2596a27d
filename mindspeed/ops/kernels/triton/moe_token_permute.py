"""Token permutation in Triton: gathers and weighted gather-sums, driven by the map of destination rows; no atomics, no waiting."""

# T tokens, K copies per token, R permuted rows, H hidden

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed.ops._moe import _probs_gradient
from mindspeed.ops.kernels.triton._launch import Build, as_rows, triton_body

COLUMNS = 1024


@triton.jit
def _gather(x_ptr, index_ptr, y_ptr, x_stride, size, divisor, BLOCK: tl.constexpr):
    """`y[r] = x[index[r] // divisor]`."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index_ptr + row) // divisor
    tl.store(y_ptr + row * size + cols, tl.load(x_ptr + source * x_stride + cols, mask=cols < size), mask=cols < size)


@triton.jit
def _gathered_sum(x_ptr, map_ptr, weights_ptr, y_ptr, x_stride, rows, copies, size, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """`y[t] = sum_j weights[t, j] * x[map[t, j]]` over the copies that exist."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for copy in range(0, copies):
        row = tl.load(map_ptr + token * copies + copy).to(tl.int64)
        limit = tl.where((row >= 0) & (row < rows), size, 0)
        value = tl.load(x_ptr + row * x_stride + cols, mask=cols < limit, other=0.0).to(tl.float32)
        if WEIGHTS:
            value *= tl.load(weights_ptr + token * copies + copy).to(tl.float32)
        total += tl.where(cols < limit, value, 0.0)
    tl.store(y_ptr + token * size + cols, total, mask=cols < size)


@triton.jit
def _spread(
    dout_ptr, permuted_ptr, map_ptr, probs_ptr, dpermuted_ptr, dprobs_ptr, dout_stride, permuted_stride, rows, copies, size,
    PROBS: tl.constexpr, NEED_DPROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`dpermuted[map[t, j]] = probs[t, j] * dout[t]` and `dprobs[t, j] = sum(permuted[map[t, j]] * dout[t])`."""
    token = tl.program_id(0).to(tl.int64)
    place = token * copies + tl.program_id(1)
    row = tl.load(map_ptr + place).to(tl.int64)
    limit = tl.where((row >= 0) & (row < rows), size, 0)
    prob = 1.0
    if PROBS:
        prob = tl.load(probs_ptr + place).to(tl.float32)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        live = cols < limit
        dout = tl.load(dout_ptr + token * dout_stride + cols, mask=live, other=0.0).to(tl.float32)
        tl.store(dpermuted_ptr + row * size + cols, dout * prob, mask=live)
        if NEED_DPROBS:
            value = tl.load(permuted_ptr + row * permuted_stride + cols, mask=live, other=0.0).to(tl.float32)
            product += tl.where(live, value * dout, 0.0)
    if NEED_DPROBS:
        tl.store(dprobs_ptr + place, tl.sum(product, 0))


def _blocks(size: int) -> tuple[int, int]:
    """(columns of one program, programs per row)."""
    block = min(COLUMNS, triton.next_power_of_2(size))
    return block, triton.cdiv(size, block)


@triton_body("moe_token_permute")
def moe_token_permute(tokens: Tensor, indices: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Forward."""
    flat, rows = indices.flatten(), as_rows(tokens)
    order = torch.argsort(flat, stable=True)
    sorted_indices = torch.empty(flat.shape, dtype=torch.int32, device=flat.device)
    sorted_indices[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    permuted = torch.empty(num_out, rows.shape[1], dtype=tokens.dtype, device=tokens.device)
    if num_out:
        block, programs = _blocks(rows.shape[1])
        copies = flat.numel() // rows.shape[0]
        _gather[(num_out, programs)](rows, order, permuted, rows.stride(0), rows.shape[1], copies, BLOCK=block)
    return permuted, sorted_indices


@triton_body("moe_token_unpermute")
def moe_token_unpermute(permuted: Tensor, row_map: Tensor, probs: Tensor | None) -> Tensor:
    """Forward."""
    rows, (count, copies) = as_rows(permuted), row_map.shape
    out = torch.empty(count, rows.shape[1], dtype=permuted.dtype, device=permuted.device)
    block, programs = _blocks(rows.shape[1])
    _gathered_sum[(count, programs)](
        rows, row_map.contiguous(), rows if probs is None else probs.contiguous(), out, rows.stride(0), *(rows.shape[0], copies),
        rows.shape[1], WEIGHTS=probs is not None, BLOCK=block,
    )  # fmt: skip
    return out


@triton_body("moe_token_permute_backward")
def moe_token_permute_backward(dpermuted: Tensor, row_map: Tensor) -> Tensor:
    """Gradient of the tokens."""
    return moe_token_unpermute(dpermuted, row_map, None)


@triton_body("moe_permute_map_backward")
def moe_permute_map_backward(dpermuted: Tensor, dprobs: Tensor | None, row_map: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and probabilities."""
    dtokens = moe_token_unpermute(dpermuted, row_map, None)
    return dtokens, dpermuted.new_empty(0) if dprobs is None else _probs_gradient(dprobs, row_map)


@triton_body("moe_token_unpermute_backward")
def moe_token_unpermute_backward(
    dout: Tensor, permuted: Tensor | None, row_map: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the permuted tokens and of the probabilities."""
    dout_rows, (count, copies) = as_rows(dout), row_map.shape
    kept = dout_rows if permuted is None else as_rows(permuted)
    dpermuted = torch.zeros(rows, dout.shape[1], dtype=dout.dtype, device=dout.device)  # rows that no copy went to stay zero
    dprobs = dout.new_empty(0 if permuted is None else row_map.shape, dtype=torch.float32)
    block, _ = _blocks(dout.shape[1])
    _spread[(count, copies)](
        dout_rows, kept, row_map.contiguous(), dout_rows if probs is None else probs.contiguous(), dpermuted, dprobs,
        dout_rows.stride(0), kept.stride(0), rows, copies, dout.shape[1],
        PROBS=probs is not None, NEED_DPROBS=permuted is not None, BLOCK=block,
    )  # fmt: skip
    return dpermuted, dout.new_empty(0) if permuted is None else dprobs.view(probs.shape).to(probs.dtype)


BUILDS = (
    Build(_gather, "*bf16 *i64 *bf16 i64 i32 i32", {"BLOCK": COLUMNS}),
    Build(_gathered_sum, "*bf16 *i32 *fp32 *bf16 i64 i32 i32 i32", {"WEIGHTS": True, "BLOCK": COLUMNS}),
    Build(
        _spread,
        "*bf16 *bf16 *i32 *fp32 *bf16 *fp32 i64 i64 i32 i32 i32",
        {"PROBS": True, "NEED_DPROBS": True, "BLOCK": COLUMNS},
    ),
)
