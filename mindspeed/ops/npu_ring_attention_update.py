"""Merge of two attention results over disjoint key sets, from their softmax statistics."""

# S positions, B batch, N heads, D head size, H = N*D, T tokens of a packed batch

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import block_rows, row_blocks, widen
from mindspeed.ops._groups import ENDS, SIZES, check_integers, host_sizes
from mindspeed.ops._registry import define, on_host, register_kernel, strict
from mindspeed.ops._softmax_statistics import block_index, to_blocks, to_tokens
from mindspeed.ops._transfer import to_device

OP = "npu_ring_attention_update"
STATISTICS = (torch.float32, torch.float64)


def npu_ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    actual_seq_qlen: Tensor | Sequence[int] | None = None,
    layout: str = "SBH",
    *,
    softmax_layout: str = "",
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, max, sum)` of attention over both key sets; exact for any split, not differentiable.

    layout "SBH": results [S, B, H], statistics [B, N, S, 8]. layout "TND": results [T, N, D], statistics [T, N, 8], laid out as one
    [N, s, 8] block per sequence unless `softmax_layout="TND"`; the sequences come from `actual_seq_qlen`, an int64 tensor of
    cumulative ends with leading 0, or a list of lengths. `out`: three tensors to write to, for example the `prev_*` ones.
    """
    pairs = {
        "cur_attn_out": (cur_attn_out, prev_attn_out),
        "cur_softmax_max": (cur_softmax_max, prev_softmax_max),
        "cur_softmax_sum": (cur_softmax_sum, prev_softmax_sum),
    }
    for name, (cur, prev) in pairs.items():
        dtypes = _checks.FLOATS if name == "cur_attn_out" else STATISTICS
        _checks.tensor(OP, name.replace("cur", "prev"), prev, dtypes)
        _checks.tensor(OP, name, cur, dtypes)
        _checks.shape(OP, name, cur, prev.shape)
        _checks.dtype_of(OP, name, cur, prev.dtype)
    every = {name.replace("cur", "prev"): prev for name, (_, prev) in pairs.items()}
    _checks.same_device(OP, **every, **{name: cur for name, (cur, _) in pairs.items()})
    _checks.option(OP, "layout", layout, ("SBH", "TND"))
    _checks.option(OP, "softmax_layout", softmax_layout, ("", "TND"))
    _check_statistics(prev_attn_out, prev_softmax_max, prev_softmax_sum, layout)
    ends = None
    if layout == "TND" and softmax_layout != "TND":
        _checks.require(
            OP, "actual_seq_qlen", actual_seq_qlen is not None, "must be given for statistics in sequence blocks", None
        )
        ends = _ends(actual_seq_qlen, prev_attn_out)
    if out is not None:
        _check_out(out, (prev_attn_out, prev_softmax_max, prev_softmax_sum))
    results = torch.ops.mindspeed.ring_attention_update(
        prev_attn_out,
        prev_softmax_max,
        prev_softmax_sum,
        cur_attn_out,
        cur_softmax_max,
        cur_softmax_sum,
        ends,
        layout,
        softmax_layout,
    )
    if out is None:
        return results
    for target, result in zip(out, results, strict=True):
        target.copy_(result)
    return out


def _check_statistics(attn_out: Tensor, top: Tensor, total: Tensor, layout: str) -> None:
    if layout == "SBH":
        _checks.tensor(OP, "prev_attn_out", attn_out, ndim=3)
        _checks.tensor(OP, "prev_softmax_max", top, ndim=4)
        heads = top.shape[1]
        _checks.require(
            OP, "prev_softmax_max", heads and attn_out.shape[2] % heads == 0, "must have a head count that divides H", heads
        )
        _checks.shape(OP, "prev_softmax_max", top, (attn_out.shape[1], heads, attn_out.shape[0], top.shape[3]))
    else:
        _checks.tensor(OP, "prev_attn_out", attn_out, ndim=3)
        _checks.shape(OP, "prev_softmax_max", top, (*attn_out.shape[:2], top.shape[-1]))
    _checks.shape(OP, "prev_softmax_sum", total, top.shape)


def _ends(actual_seq_qlen: Tensor | Sequence[int], attn_out: Tensor) -> Tensor:
    """Cumulative ends with leading 0 as an int64 tensor on the device of the results [T, N, D]."""
    name, (tokens, *_), device = "actual_seq_qlen", attn_out.shape, attn_out.device
    if not isinstance(actual_seq_qlen, Tensor):
        check_integers(OP, name, actual_seq_qlen)
        lengths = host_sizes(OP, name, actual_seq_qlen, tokens, SIZES)
        return to_device([0, *itertools.accumulate(lengths)], device)
    _checks.tensor(OP, name, actual_seq_qlen, (torch.int64,), ndim=1)
    _checks.near(OP, name, actual_seq_qlen, device)
    if on_host(actual_seq_qlen) or strict():
        values = actual_seq_qlen.tolist()
        _checks.require(OP, name, values[:1] == [0], "must hold cumulative ends with a leading 0", values)
        host_sizes(OP, name, values[1:], tokens, ENDS)
    return to_device(actual_seq_qlen, device)


def _check_out(out: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    _checks.require(OP, "out", len(out) == 3, "must be three tensors", len(out))
    for index, (target, value) in enumerate(zip(out, like, strict=True)):
        _checks.tensor(OP, f"out[{index}]", target, (value.dtype,))
        _checks.shape(OP, f"out[{index}]", target, value.shape)
        _checks.same_device(OP, prev_attn_out=value, **{f"out[{index}]": target})


def _weights(prev_max: Tensor, prev_sum: Tensor, cur_max: Tensor, cur_sum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merged statistics and the weight of each side; both weights are 0 for rows that see nothing."""
    top = torch.maximum(prev_max, cur_max)
    base = top.masked_fill(top == float("-inf"), 0.0)  # -inf - (-inf) would be NaN
    prev, cur = prev_sum * (prev_max - base).exp(), cur_sum * (cur_max - base).exp()
    total = prev + cur
    scale = total.masked_fill(total == 0, 1.0).reciprocal()
    return top, total, prev * scale, cur * scale


def _token_weights(weight: Tensor, layout: str) -> Tensor:
    """[S, B, N, 1] or [T, N, 1] from statistics-shaped weights."""
    return weight[..., :1] if layout == "TND" else weight[..., :1].permute(2, 0, 1, 3)


def _by_head(out: Tensor, heads: int, layout: str) -> Tensor:
    """[S, B, N, D] or [T, N, D] view of a result."""
    return out if layout == "TND" else out.unflatten(2, (heads, out.shape[2] // heads))


def _statistics(stats: tuple[Tensor, ...], ends: Tensor | None, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merged statistics in the caller's arrangement, and the weights as they multiply the results."""
    if ends is None:
        top, total, prev, cur = _weights(*stats)
    else:
        index = block_index(ends.diff(), *stats[0].shape[:2])
        top, total, prev, cur = _weights(*(to_tokens(value, index) for value in stats))
        top, total = to_blocks(top, index), to_blocks(total, index)
    return top.contiguous(), total.contiguous(), _token_weights(prev, layout), _token_weights(cur, layout)


def _reference(
    prev_out: Tensor,
    prev_max: Tensor,
    prev_sum: Tensor,
    cur_out: Tensor,
    cur_max: Tensor,
    cur_sum: Tensor,
    actual_seq_qlen: Tensor | None,
    layout: str,
    softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    top, total, prev, cur = _statistics((prev_max, prev_sum, cur_max, cur_sum), actual_seq_qlen, layout)
    first, second = (_by_head(value, prev.shape[-2], layout).to(prev.dtype) for value in (prev_out, cur_out))
    merged = first * prev + second * cur
    return merged.to(prev_out.dtype).reshape(prev_out.shape).contiguous(), top, total


define(
    "ring_attention_update(Tensor prev_out, Tensor prev_max, Tensor prev_sum, Tensor cur_out, Tensor cur_max, Tensor cur_sum,"
    " Tensor? actual_seq_qlen, str layout, str softmax_layout) -> (Tensor out, Tensor softmax_max, Tensor softmax_sum)",
    family="ring_attention_update",
    reference=_reference,
    fake=lambda prev_out, prev_max, prev_sum, *_: tuple(
        value.new_empty(value.shape) for value in (prev_out, prev_max, prev_sum)
    ),
)


@register_kernel("ring_attention_update", "aten", devices=("cpu",))
def _blocked(
    prev_out: Tensor,
    prev_max: Tensor,
    prev_sum: Tensor,
    cur_out: Tensor,
    cur_max: Tensor,
    cur_sum: Tensor,
    actual_seq_qlen: Tensor | None,
    layout: str,
    softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    top, total, prev, cur = _statistics((prev_max, prev_sum, cur_max, cur_sum), actual_seq_qlen, layout)
    heads, wide = prev.shape[-2], prev.dtype
    prev, cur = prev.reshape(-1, heads, 1), cur.reshape(-1, heads, 1)
    tokens = prev.shape[0]
    first, second = (_by_head(value, heads, layout).flatten(0, -3) for value in (prev_out, cur_out))
    merged = torch.empty(prev_out.shape, dtype=prev_out.dtype)
    merged_rows = merged.view(tokens, heads, -1)
    token_bytes = 4 * first.shape[1] * first.shape[2]
    buffers = [torch.empty(block_rows(tokens, token_bytes), *first.shape[1:], dtype=wide) for _ in range(2)]
    for block in row_blocks(tokens, token_bytes):
        size = block.stop - block.start
        work = torch.mul(widen(first[block], buffers[0]), prev[block], out=buffers[0][:size])
        work.addcmul_(widen(second[block], buffers[1]), cur[block])
        merged_rows[block] = work
    return merged, top, total
