"""Operators that move tokens to their experts and back, driven by a map of destination rows.

`row_map[t, j]` (int32) is the permuted row of the j-th copy of token t; an entry outside [0, rows) means that this copy does not
exist. Public forms: `npu_moe_token_permute`, `npu_moe_token_unpermute` (j counts the top-k choices) and `moe_routing_map` (j counts
the experts).
"""

# T tokens, K copies per token (top-k or experts), H hidden, R permuted rows, E experts

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import row_blocks
from mindspeed.ops._registry import below_autograd, define, register_kernel


def gathered_sum(permuted: Tensor, row_map: Tensor, weights: Tensor | None) -> Tensor:
    """`out[t] = sum_j weights[t, j] * permuted[row_map[t, j]]` in the wide dtype, rounded once: the reference form."""
    wide = _checks.wide_dtype(permuted)
    token, copy = ((row_map >= 0) & (row_map < permuted.shape[0])).nonzero(as_tuple=True)
    rows = permuted.index_select(0, row_map[token, copy]).to(wide)
    if weights is not None:
        rows = rows * weights[token, copy].to(wide).unsqueeze(1)
    out = torch.zeros(row_map.shape[0], permuted.shape[1], dtype=wide, device=permuted.device)
    return out.index_add_(0, token, rows).to(permuted.dtype)


def _permute(tokens: Tensor, indices: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    flat = indices.flatten()
    order = torch.argsort(flat, stable=True)
    sorted_indices = torch.empty(flat.shape, dtype=torch.int32, device=flat.device)
    sorted_indices[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    copies = flat.numel() // max(tokens.shape[0], 1)
    return tokens.index_select(0, order[:num_out] // max(copies, 1)), sorted_indices


def _permute_backward(dpermuted: Tensor, row_map: Tensor) -> Tensor:
    return gathered_sum(dpermuted, row_map, None)


def _permute_map(
    tokens: Tensor, routing_map: Tensor, probs: Tensor | None, num_out: int, drop_and_pad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count, experts = routing_map.shape
    by_expert = routing_map.t()
    row_map = torch.full((count, experts), -1, dtype=torch.int32, device=tokens.device)
    if drop_and_pad:  # every expert takes the same number of tokens: routed ones first, then others in order
        capacity = _capacity(num_out, routing_map)
        source = by_expert.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :capacity].flatten()
        expert = torch.arange(experts, device=tokens.device).repeat_interleave(capacity)
        row_map[source, expert] = torch.arange(source.numel(), dtype=torch.int32, device=tokens.device)
    else:  # expert-major order, without asking the device how many there are
        position = by_expert.flatten().to(torch.int64).cumsum(0) - 1
        routed = by_expert.flatten() & (position < num_out)
        slot = torch.where(routed, position, num_out)
        flat = torch.zeros(num_out + 1, dtype=torch.int64, device=tokens.device)
        flat.scatter_(0, slot, torch.arange(slot.numel(), device=tokens.device))
        expert, source = flat[:num_out] // max(count, 1), flat[:num_out] % max(count, 1)
        row_map.t().copy_(torch.where(routed, position, -1).view(experts, count))
    permuted_probs = tokens.new_empty(0) if probs is None else probs[source, expert]
    return tokens.index_select(0, source), permuted_probs, row_map


def _capacity(num_out: int, routing_map: Tensor) -> int:
    """Rows of each expert with `drop_and_pad`."""
    count, experts = routing_map.shape
    return min(num_out // max(experts, 1), count)


def _permute_map_backward(dpermuted: Tensor, dprobs: Tensor | None, row_map: Tensor) -> tuple[Tensor, Tensor]:
    dtokens = gathered_sum(dpermuted, row_map, None)
    return dtokens, dpermuted.new_empty(0) if dprobs is None else _probs_gradient(dprobs, row_map)


def _probs_gradient(dprobs: Tensor, row_map: Tensor) -> Tensor:
    exists = (row_map >= 0) & (row_map < dprobs.shape[0])
    gathered = dprobs[row_map.clamp(0, max(dprobs.shape[0] - 1, 0)).to(torch.int64)] if dprobs.numel() else dprobs.new_zeros(())
    return torch.where(exists, gathered, 0)


def _unpermute_backward(
    dout: Tensor, permuted: Tensor | None, row_map: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    wide = _checks.wide_dtype(dout)
    token, copy = ((row_map >= 0) & (row_map < rows)).nonzero(as_tuple=True)
    target = row_map[token, copy].to(torch.int64)
    grads = dout.index_select(0, token).to(wide)
    weighted = grads if probs is None else grads * probs[token, copy].to(wide).unsqueeze(1)
    dpermuted = dout.new_zeros(rows, dout.shape[1])
    dpermuted[target] = weighted.to(dout.dtype)
    if permuted is None:
        return dpermuted, dout.new_empty(0)
    dprobs = torch.zeros(probs.shape, dtype=wide, device=probs.device)
    dprobs[token, copy] = (permuted.index_select(0, target).to(wide) * grads).sum(1)
    return dpermuted, dprobs.to(probs.dtype)


def _fake_permute_map(tokens, routing_map, probs, num_out, drop_and_pad):  # noqa: ANN001, ANN202
    count, experts = routing_map.shape
    rows = experts * _capacity(num_out, routing_map) if drop_and_pad else num_out
    permuted_probs = tokens.new_empty(0) if probs is None else probs.new_empty(rows)
    return tokens.new_empty(rows, tokens.shape[1]), permuted_probs, routing_map.new_empty((count, experts), dtype=torch.int32)


class _Permute(torch.autograd.Function):
    """Keeps the destination rows."""

    @staticmethod
    def forward(ctx, tokens, indices, num_out):  # noqa: ANN001, ANN205
        permuted, sorted_indices = below_autograd("moe_token_permute", tokens, indices, num_out)
        ctx.save_for_backward(sorted_indices)
        ctx.tokens = tokens.shape[0]
        ctx.mark_non_differentiable(sorted_indices)
        return permuted, sorted_indices

    @staticmethod
    def backward(ctx, dpermuted, _):  # noqa: ANN001, ANN205
        (sorted_indices,) = ctx.saved_tensors
        copies = sorted_indices.shape[0] // max(ctx.tokens, 1)
        return torch.ops.mindspeed.moe_token_permute_backward(dpermuted, sorted_indices.view(ctx.tokens, copies)), None, None


class _PermuteMap(torch.autograd.Function):
    """Keeps the destination rows."""

    @staticmethod
    def forward(ctx, tokens, routing_map, probs, num_out, drop_and_pad):  # noqa: ANN001, ANN205
        permuted, permuted_probs, row_map = below_autograd("moe_permute_map", tokens, routing_map, probs, num_out, drop_and_pad)
        ctx.save_for_backward(row_map)
        ctx.has_probs = probs is not None
        ctx.mark_non_differentiable(row_map)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = permuted.shape, permuted.dtype
        return permuted, permuted_probs, row_map

    @staticmethod
    def backward(ctx, dpermuted, dprobs, _):  # noqa: ANN001, ANN205
        (row_map,) = ctx.saved_tensors
        need_tokens, _, need_probs = ctx.needs_input_grad[:3]
        if dpermuted is None:
            dpermuted = torch.zeros(ctx.shape, dtype=ctx.dtype, device=row_map.device)
        dprobs = dprobs if need_probs else None
        dtokens, dp = torch.ops.mindspeed.moe_permute_map_backward(dpermuted, dprobs, row_map)
        return dtokens if need_tokens else None, None, dp if dprobs is not None else None, None, None


class _Unpermute(torch.autograd.Function):
    """Keeps the destination rows, the probabilities, and the permuted tokens only for a gradient of the probabilities."""

    @staticmethod
    def forward(ctx, permuted, row_map, probs):  # noqa: ANN001, ANN205
        ctx.save_for_backward(permuted if ctx.needs_input_grad[2] else None, row_map, probs)
        ctx.rows = permuted.shape[0]
        return below_autograd("moe_token_unpermute", permuted, row_map, probs)

    @staticmethod
    def backward(ctx, dout):  # noqa: ANN001, ANN205
        permuted, row_map, probs = ctx.saved_tensors
        dpermuted, dprobs = torch.ops.mindspeed.moe_token_unpermute_backward(dout, permuted, row_map, probs, ctx.rows)
        return dpermuted if ctx.needs_input_grad[0] else None, None, dprobs if ctx.needs_input_grad[2] else None


define(
    "moe_token_permute(Tensor tokens, Tensor indices, int num_out) -> (Tensor permuted, Tensor sorted_indices)",
    family="moe_token_permute",
    reference=_permute,
    fake=lambda tokens, indices, num_out: (
        tokens.new_empty(num_out, tokens.shape[1]),
        indices.new_empty(indices.numel(), dtype=torch.int32),
    ),
    autograd=_Permute,
)
define(
    "moe_token_permute_backward(Tensor dpermuted, Tensor row_map) -> Tensor",
    family="moe_token_permute",
    reference=_permute_backward,
    fake=lambda dpermuted, row_map: dpermuted.new_empty(row_map.shape[0], dpermuted.shape[1]),
)
define(
    "moe_permute_map(Tensor tokens, Tensor routing_map, Tensor? probs, int num_out, bool drop_and_pad)"
    " -> (Tensor permuted, Tensor permuted_probs, Tensor row_map)",
    family="moe_token_permute",
    reference=_permute_map,
    fake=_fake_permute_map,
    autograd=_PermuteMap,
)
define(
    "moe_permute_map_backward(Tensor dpermuted, Tensor? dpermuted_probs, Tensor row_map) -> (Tensor dtokens, Tensor dprobs)",
    family="moe_token_permute",
    reference=_permute_map_backward,
    fake=lambda dpermuted, dprobs, row_map: (
        dpermuted.new_empty(row_map.shape[0], dpermuted.shape[1]),
        dpermuted.new_empty(0) if dprobs is None else dprobs.new_empty(row_map.shape),
    ),
)
define(
    "moe_token_unpermute(Tensor permuted, Tensor row_map, Tensor? probs) -> Tensor",
    family="moe_token_permute",
    reference=gathered_sum,
    fake=lambda permuted, row_map, probs: permuted.new_empty(row_map.shape[0], permuted.shape[1]),
    autograd=_Unpermute,
)
define(
    "moe_token_unpermute_backward(Tensor dout, Tensor? permuted, Tensor row_map, Tensor? probs, int rows)"
    " -> (Tensor dpermuted, Tensor dprobs)",
    family="moe_token_permute",
    reference=_unpermute_backward,
    fake=lambda dout, permuted, row_map, probs, rows: (
        dout.new_empty(rows, dout.shape[1]),
        dout.new_empty(0) if permuted is None else probs.new_empty(probs.shape),
    ),
)


def _dense(row_map: Tensor, weights: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None] | None:
    """The existing copies as [T, k] rows and weights if every token has equally many of them, else None."""
    exists = (row_map >= 0) & (row_map < rows)
    copies = exists.sum(1)
    if copies.numel() == 0 or copies[0] == 0 or not bool((copies == copies[0]).all()):
        return None
    shape = (row_map.shape[0], int(copies[0]))
    if shape[1] == row_map.shape[1]:
        return row_map, weights
    return row_map[exists].view(shape), None if weights is None else weights[exists].view(shape)


def _sum_blocks(permuted: Tensor, row_map: Tensor, weights: Tensor | None) -> Tensor:
    """`gathered_sum` for a map without gaps: a few tokens at a time, so that gathered rows stay in the cache."""
    wide, (count, copies), size = _checks.wide_dtype(permuted), row_map.shape, permuted.shape[1]
    out = torch.empty(count, size, dtype=permuted.dtype)
    weights = None if weights is None else weights.to(wide)
    for block in row_blocks(count, copies * size * 4):
        rows = permuted.index_select(0, row_map[block].flatten()).to(wide).view(-1, copies, size)
        if weights is not None:
            rows.mul_(weights[block].unsqueeze(2))
        total = rows[:, 0]
        for copy in range(1, copies):
            total.add_(rows[:, copy])
        out[block] = total
    return out


@register_kernel("moe_token_unpermute", "aten", devices=("cpu",))
def _unpermute_cpu(permuted: Tensor, row_map: Tensor, probs: Tensor | None) -> Tensor:
    dense = _dense(row_map, probs, permuted.shape[0])
    return gathered_sum(permuted, row_map, probs) if dense is None else _sum_blocks(permuted, *dense)


@register_kernel("moe_token_permute_backward", "aten", devices=("cpu",))
def _permute_backward_cpu(dpermuted: Tensor, row_map: Tensor) -> Tensor:
    return _unpermute_cpu(dpermuted, row_map, None)


@register_kernel("moe_permute_map_backward", "aten", devices=("cpu",))
def _permute_map_backward_cpu(dpermuted: Tensor, dprobs: Tensor | None, row_map: Tensor) -> tuple[Tensor, Tensor]:
    dp = dpermuted.new_empty(0) if dprobs is None else _probs_gradient(dprobs, row_map)
    return _unpermute_cpu(dpermuted, row_map, None), dp


@register_kernel("moe_token_unpermute_backward", "aten", devices=("cpu",))
def _unpermute_backward_cpu(
    dout: Tensor, permuted: Tensor | None, row_map: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    dense = _dense(row_map, probs, rows)
    if dense is None or dense[0].shape != row_map.shape:
        return _unpermute_backward(dout, permuted, row_map, probs, rows)
    wide, (count, copies), size = _checks.wide_dtype(dout), row_map.shape, dout.shape[1]
    dpermuted = torch.zeros(rows, size, dtype=dout.dtype)
    dprobs = dout.new_empty(0) if permuted is None else torch.empty(count, copies, dtype=wide)
    weights = None if probs is None else probs.to(wide)
    for block in row_blocks(count, size * 4):
        grads = dout[block].to(wide)
        for copy in range(copies):
            target = row_map[block, copy]
            weighted = grads if weights is None else grads * weights[block, copy].unsqueeze(1)
            dpermuted.index_copy_(0, target.to(torch.int64), weighted.to(dout.dtype))
            if permuted is not None:
                dprobs[block, copy] = torch.linalg.vecdot(permuted.index_select(0, target).to(wide), grads)
    return dpermuted, dprobs if permuted is None else dprobs.to(probs.dtype)
