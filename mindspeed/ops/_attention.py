"""Operator `fusion_attention` and its backward: attention in five layouts with the masks of `_attention_scores`.

The reference works on at most `ROWS` query rows at a time, so its memory is O(ROWS * Sk) and not O(Sq * Sk). On a CPU, aten's flash
kernel (`_attention_flash`) runs instead wherever it applies. Public form: `mindspeed.ops.fusion_attention_v2`.
"""

# B batch, N query heads, G query heads per key head, Sq / Sk positions, D head size, T tokens of a packed batch

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._attention_scores import Options, Segment, bias, compressed, compressed_index, excluded, segments
from mindspeed.ops._random import draw
from mindspeed.ops._registry import below_autograd, define

ROWS = 256
STATISTICS = 8
"""Copies of each softmax statistic in the last dimension, as the NPU kernels have it."""


def heads_first(value: Tensor, layout: str, heads: int) -> Tensor:
    """A [B, N, S, D] view of a tensor in any layout; TND gives B = 1."""
    if layout in ("BSH", "SBH"):
        value = value.unflatten(-1, (heads, -1))
    return value.permute({"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "SBH": (1, 2, 0, 3), "BNSD": (0, 1, 2, 3)}[layout])


def views(value: Tensor, options: Options, heads: int) -> Tensor:
    """`heads_first` for all layouts."""
    if options.layout == "TND":
        return value.transpose(0, 1).unsqueeze(0)
    return heads_first(value, options.layout, heads)


def key_heads(query: Tensor, key: Tensor, options: Options) -> int:
    """Number of key and value heads."""
    if options.layout in ("BSH", "SBH"):
        return key.shape[-1] // (query.shape[-1] // options.head_num)
    return key.shape[{"BSND": 2, "BNSD": 1, "TND": 1}[options.layout]]


def out_shape(query: Tensor, key: Tensor, value: Tensor, options: Options) -> list[int]:
    """Shape of the result: that of query with the head size of value."""
    shape = list(query.shape)
    if options.layout in ("BSH", "SBH"):
        shape[-1] = value.shape[-1] // key_heads(query, key, options) * options.head_num
    else:
        shape[-1] = value.shape[-1]
    return shape


def statistics_shape(query: Tensor, options: Options) -> list[int]:
    """[B, N, Sq, 8], or [T, N, 8]."""
    if options.layout == "TND":
        return [query.shape[0], options.head_num, STATISTICS]
    return [*heads_first(query, options.layout, options.head_num).shape[:3], STATISTICS]


def statistics_view(statistics: Tensor, options: Options) -> Tensor:
    """[B, N, Sq, 8] view of the statistics of any layout."""
    return statistics.transpose(0, 1).unsqueeze(0) if options.layout == "TND" else statistics


class _Chunks:
    """Row blocks of one segment of attention in wide precision, with the same dropout in forward and backward."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, options: Options, segment: Segment, generator: object
    ) -> None:
        self.options, self.segment, self.generator = options, segment, generator
        self.wide = _checks.wide_dtype(query)
        self.query = query
        self.batch, self.heads, self.queries = query.shape[:3]
        self.kv_heads, self.keys = key.shape[1:3]
        self.key, self.value = (tensor.to(self.wide).unsqueeze(2) for tensor in (key, value))

    def grouped(self, tensor: Tensor, rows: slice) -> Tensor:
        """[B, Nkv, G, R, *] of a slice of query rows, wide."""
        return tensor[:, :, rows].to(self.wide).unflatten(1, (self.kv_heads, -1))

    def rows(self) -> Iterator[slice]:
        for start in range(0, self.queries, ROWS):
            yield slice(start, min(start + ROWS, self.queries))

    def scores(self, rows: slice) -> Tensor:
        """Masked scores [B, N, R, Sk]."""
        options = self.options
        products = (self.grouped(self.query, rows) @ self.key.transpose(-1, -2)).flatten(1, 2)
        added = bias(options, self.segment, rows, self.queries, self.keys)
        if added is None:
            scores = products * options.scale
        elif options.pse_type == 1:
            scores = (products + added.to(self.wide)) * options.scale
        else:
            scores = products * options.scale + added.to(self.wide)
        mask = excluded(options, self.segment, rows, self.queries, self.keys, scores.device)
        return scores if mask is None else scores.masked_fill(mask, float("-inf"))

    def dropout(self, like: Tensor) -> Tensor | None:
        """Z = keep / keep_prob for the next block; blocks must be visited in order."""
        keep_prob = self.options.keep_prob
        if keep_prob == 1.0:
            return None
        mask = torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(keep_prob, generator=self.generator)
        return mask.to(self.wide) / keep_prob


def problems(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Iterator[tuple[Segment, Tensor, Tensor, Tensor]]:
    kv_heads = key_heads(query, key, options)
    q, k, v = views(query, options, options.head_num), views(key, options, kv_heads), views(value, options, kv_heads)
    if q.numel() == 0:
        return
    for segment in segments(q.shape[2], k.shape[2], options):
        yield segment, q[:, :, segment.queries], k[:, :, segment.keys], v[:, :, segment.keys]


def _generator(options: Options, device: torch.device) -> torch.Generator | None:
    if options.keep_prob == 1.0:
        return None
    seed, offset = options.rng.tolist()
    return torch.Generator(device).manual_seed((seed + offset * 0x9E3779B97F4A7C15) % (1 << 63))


def results(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The result and the statistics, filled as for rows that see nothing."""
    out = query.new_zeros(out_shape(query, key, value, options))
    shape, wide = statistics_shape(query, options), _checks.wide_dtype(query)
    return out, query.new_full(shape, float("-inf"), dtype=wide), query.new_zeros(shape, dtype=wide)


def _reference(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*rest)
    out, top, total = results(query, key, value, options)
    targets = views(out, options, options.head_num), statistics_view(top, options), statistics_view(total, options)
    generator = _generator(options, query.device)
    for segment, q, k, v in problems(query, key, value, options):
        if k.shape[2] == 0:
            continue
        chunks = _Chunks(q, k, v, options, segment, generator)
        segment_out, segment_top, segment_total = (target[:, :, segment.queries] for target in targets)
        for rows in chunks.rows():
            scores = chunks.scores(rows)
            maximum = scores.amax(-1, keepdim=True)
            weights = (scores - maximum.masked_fill(maximum == float("-inf"), 0.0)).exp_()
            sums = weights.sum(-1, keepdim=True)
            segment_top[:, :, rows], segment_total[:, :, rows] = maximum, sums
            weights = weights.div_(sums.masked_fill(sums == 0, 1.0))
            if (kept := chunks.dropout(weights)) is not None:
                weights.mul_(kept)
            segment_out[:, :, rows] = (weights.unflatten(1, (chunks.kv_heads, -1)) @ chunks.value).flatten(1, 2)
    return out, top, total


def _reference_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    top: Tensor,
    total: Tensor,
    need_dpse: bool,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(*rest)
    kv_heads = key_heads(query, key, options)
    grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    dq, dk, dv = (
        views(grad, options, heads) for grad, heads in zip(grads, (options.head_num, kv_heads, kv_heads), strict=True)
    )
    wide = _checks.wide_dtype(query)
    dpse = options.pse.new_zeros(options.pse.shape, dtype=wide) if need_dpse else None
    kept = views(dout, options, options.head_num), views(out, options, options.head_num)
    lse = log_sum_exp(top, total, options)
    generator = _generator(options, query.device)
    for segment, q, k, v in problems(query, key, value, options):
        if k.shape[2] == 0:
            continue
        chunks = _Chunks(q, k, v, options, segment, generator)
        parts = tuple(tensor[:, :, segment.queries] for tensor in (*kept, lse, dq))
        segment_dk, segment_dv = _segment_backward(chunks, *parts, None if dpse is None else segment.own(dpse))
        dk[:, :, segment.keys], dv[:, :, segment.keys] = segment_dk, segment_dv
    return *grads, query.new_empty(0) if dpse is None else dpse.to(options.pse.dtype)


def _segment_backward(
    chunks: _Chunks, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dpse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the queries, add to that of the bias, and return those of keys and values."""
    dk, dv = torch.zeros_like(chunks.key), torch.zeros_like(chunks.value)
    for rows in chunks.rows():
        scores, row_lse = chunks.scores(rows), lse[:, :, rows]
        seen = row_lse != float("-inf")
        probs = (scores - row_lse.masked_fill(~seen, 0.0)).exp_().mul_(seen)
        grad = chunks.grouped(dout, rows)
        dprobs = (grad @ chunks.value.transpose(-1, -2)).flatten(1, 2)
        weights = probs
        if (kept := chunks.dropout(probs)) is not None:
            dprobs.mul_(kept)
            weights = probs * kept
        dv += (weights.unflatten(1, (chunks.kv_heads, -1)).transpose(-1, -2) @ grad).sum(2, keepdim=True)
        delta = (dout[:, :, rows].to(chunks.wide) * out[:, :, rows].to(chunks.wide)).sum(-1, keepdim=True)
        dscores = probs.mul_(dprobs.sub_(delta))
        if dpse is not None:
            _add_bias_gradient(dpse, dscores, chunks, rows)
        dproducts = dscores.mul_(chunks.options.scale).unflatten(1, (chunks.kv_heads, -1))
        dq[:, :, rows] = (dproducts @ chunks.key).flatten(1, 2)
        dk += (dproducts.transpose(-1, -2) @ chunks.grouped(chunks.query, rows)).sum(2, keepdim=True)
    return dk.squeeze(2), dv.squeeze(2)


def _add_bias_gradient(dpse: Tensor, dscores: Tensor, chunks: _Chunks, rows: slice) -> None:
    options, keys = chunks.options, chunks.keys
    grad = dscores * options.scale if options.pse_type == 1 else dscores
    grad = grad.sum(0, keepdim=True) if dpse.shape[0] == 1 else grad
    if dpse.shape[2] == 1:
        dpse[..., :keys] += grad.sum(2, keepdim=True)
    elif compressed(dpse, chunks.queries):
        row, column = compressed_index(rows, chunks.queries, keys, dpse.device)
        dpse.flatten(2).index_add_(2, (row * dpse.shape[3] + column).flatten(), grad.flatten(2))
    else:
        dpse[..., rows, :keys] += grad


def log_sum_exp(top: Tensor, total: Tensor, options: Options) -> Tensor:
    """[B, N, Sq, 1] log-sum-exp of the scores; minus infinity for rows that see nothing."""
    top, total = (statistics_view(statistics[..., :1], options) for statistics in (top, total))
    return top + total.log()


def _fake(query, key, value, *rest):  # noqa: ANN001, ANN002, ANN202
    options = Options(*rest)
    shape, wide = statistics_shape(query, options), _checks.wide_dtype(query)
    return (
        query.new_empty(out_shape(query, key, value, options)),
        query.new_empty(shape, dtype=wide),
        query.new_empty(shape, dtype=wide),
    )


def _fake_backward(dout, query, key, value, out, top, total, need_dpse, *rest):  # noqa: ANN001, ANN002, ANN202
    pse = rest[2]
    grads = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return *grads, pse.new_empty(pse.shape) if need_dpse else query.new_empty(0)


class _FusionAttention(torch.autograd.Function):
    """Keeps query, key, value, pse, atten_mask, the result, its statistics and the random state; no mask of Sq x Sk numbers."""

    @staticmethod
    def forward(ctx, query, key, value, head_num, layout, pse, atten_mask, *rest):  # noqa: ANN001, ANN002, ANN205
        out, top, total = below_autograd("fusion_attention", query, key, value, head_num, layout, pse, atten_mask, *rest)
        ctx.save_for_backward(query, key, value, pse, atten_mask, out, top, total, rest[-1])
        ctx.options = (head_num, layout), rest[:-1]
        ctx.mark_non_differentiable(top, total)
        ctx.set_materialize_grads(False)
        return out, top, total

    @staticmethod
    def backward(ctx, dout, _dtop, _dtotal):  # noqa: ANN001, ANN205
        if dout is None:
            return (None,) * 20
        query, key, value, pse, atten_mask, out, top, total, rng = ctx.saved_tensors
        before, after = ctx.options
        need_dpse = ctx.needs_input_grad[5] and pse.dim() == 4  # slopes get no gradient
        grads = torch.ops.mindspeed.fusion_attention_backward(
            dout, query, key, value, out, top, total, need_dpse, *before, pse, atten_mask, *after, rng
        )
        dpse = grads[3] if need_dpse else None
        return *grads[:3], None, None, dpse, *((None,) * 14)


_OPTIONS = (
    "int head_num, str layout, Tensor? pse, Tensor? atten_mask, float scale, float keep_prob, int pre_tokens, int next_tokens,"
    " int inner_precise, int[]? prefix, int[]? actual_seq_qlen, int[]? actual_seq_kvlen, int sparse_mode, int pse_type,"
    " int[]? q_start_idx, int[]? kv_start_idx, Tensor? rng"
)
define(
    f"fusion_attention(Tensor query, Tensor key, Tensor value, {_OPTIONS})"
    " -> (Tensor out, Tensor softmax_max, Tensor softmax_sum)",
    family="fusion_attention",
    reference=_reference,
    fake=_fake,
    autograd=_FusionAttention,
)
define(
    "fusion_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor softmax_max,"
    f" Tensor softmax_sum, bool need_dpse, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dpse)",
    family="fusion_attention",
    reference=_reference_backward,
    fake=_fake_backward,
)


def random_state(query: Tensor, count: int, keep_prob: float) -> Tensor | None:
    """`(seed, offset)` for `count` random numbers, or None without dropout."""
    return draw(query.device, count) if keep_prob < 1.0 else None
