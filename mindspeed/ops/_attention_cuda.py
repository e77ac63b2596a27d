"""Body of `fusion_attention` on CUDA from aten's fused kernels; `_attention_choice` says which, `_aten_attention` calls them."""

# B batch, N query heads, Sq / Sk positions of one sequence, D head size, T tokens of a packed batch

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mindspeed.ops import _aten_attention as aten
from mindspeed.ops._attention import STATISTICS, key_heads, log_sum_exp, problems, results, statistics_view, views
from mindspeed.ops._attention_choice import Choice, Machine, Tile, select
from mindspeed.ops._attention_scores import Options, Segment, band, bias, excluded, segment_mode
from mindspeed.ops._registry import register_kernel


def machine(device: torch.device) -> Machine:
    """What the choice of a kernel needs to know of a device."""
    return Machine(torch.cuda.get_device_capability(device), _has_triton())


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _declines(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> str | None:
    choice = select(query, key, value, Options(*rest), machine(query.device))
    return choice.reason if choice.kernel == "reference" else None


def _declines_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    top: Tensor,
    total: Tensor,
    need_dpse: bool,
    *rest: object,
) -> str | None:
    choice = select(query, key, value, Options(*rest), machine(query.device), need_dpse=need_dpse)
    return choice.reason if choice.kernel == "reference" else None


def seed_of(options: Options, index: int) -> int:
    """Seed of the dropout mask of sequence `index`."""
    seed, offset = options.rng.tolist() if options.rng is not None else (0, 0)
    return aten.mixed(aten.mixed(seed, offset), index)


def _probability(options: Options) -> float:
    return 1.0 - options.keep_prob


@register_kernel("fusion_attention", "aten", devices=("cuda",), declines=_declines)
def forward(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_max, softmax_sum); the statistics are (log-sum-exp, 1), or (-inf, 0) for rows that see nothing."""
    options = Options(*rest)
    choice = select(query, key, value, options, machine(query.device))
    if choice.kernel == "flash-packed":
        return _packed(query, key, value, options, choice.tiles)
    calls = list(_calls(query, key, value, options, choice))
    if len(calls) == 1 and calls[0][1].shape[2] == views(query, options, options.head_num).shape[2]:
        return arranged(calls[0][1], options.layout), *statistics(calls[0][2], options.layout)
    out, top, total = results(query, key, value, options)
    targets = views(out, options, options.head_num), statistics_view(top, options), statistics_view(total, options)
    for rows, part, lse in calls:
        target_out, target_top, target_total = (target[:, :, rows] for target in targets)
        target_out.copy_(part)
        target_top.copy_(lse.unsqueeze(-1))
        target_total.copy_((lse != float("-inf")).unsqueeze(-1))
    return out, top, total


def arranged(value: Tensor, layout: str) -> Tensor:
    """[B, N, S, D] in a layout, contiguous; no copy where the kernel wrote it that way."""
    if layout == "TND":
        return value[0].transpose(0, 1).contiguous()
    value = value.permute(
        {"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BNSD": (0, 1, 2, 3)}[layout]
    ).contiguous()
    return value.flatten(2) if layout in ("BSH", "SBH") else value


def statistics(lse: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """softmax_max and softmax_sum from a log-sum-exp [B, N, S]: (lse, 1), or (-inf, 0) where nothing is seen."""
    lse = lse[0].t() if layout == "TND" else lse
    top = lse.unsqueeze(-1).expand(*lse.shape, STATISTICS).contiguous()
    return top, (top != float("-inf")).to(top.dtype)


def _calls(
    query: Tensor, key: Tensor, value: Tensor, options: Options, choice: Choice
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Query rows with their result [B, N, rows, Dv] and log-sum-exp [B, N, rows], one kernel call after the other."""
    common = {"scale": options.scale, "probability": _probability(options)}
    if choice.kernel == "flash":
        heads = key_heads(query, key, options)
        q, k, v = views(query, options, options.head_num), views(key, options, heads), views(value, options, heads)
        for index, tile in enumerate(choice.tiles):
            operands = q[:, :, tile.queries], k[:, :, tile.keys], v[:, :, tile.keys]
            out, lse, _ = aten.flash(*operands, **common, window=tile.window, seed=seed_of(options, index))
            yield tile.queries, out, lse
        return
    for index, (segment, q, k, v) in enumerate(problems(query, key, value, options)):
        if k.shape[2]:
            causal, parts = _parts(options, segment, q, k)
            out, lse, _ = aten.efficient(q, k, v, parts, **common, causal=causal, seed=seed_of(options, index))
            yield segment.queries, out, lse


def _packed(
    query: Tensor, key: Tensor, value: Tensor, options: Options, tiles: Sequence[Tile]
) -> tuple[Tensor, Tensor, Tensor]:
    """A TND batch in one launch; tokens after the last sequence see nothing."""
    lengths, q_end, k_end = _lengths(tiles)
    out, lse, _ = aten.flash_packed(
        query[:q_end], key[:k_end], value[:k_end], lengths, scale=options.scale, window=tiles[0].window,
        probability=_probability(options), seed=seed_of(options, 0),
    )  # fmt: skip
    if q_end == query.shape[0]:
        return out.contiguous(), *statistics(lse[None], "TND")
    whole, top, total = results(query, key, value, options)
    whole[:q_end], top[:q_end], total[:q_end] = out, lse.t().unsqueeze(-1), (lse != float("-inf")).t().unsqueeze(-1)
    return whole, top, total


def _lengths(tiles: Sequence[Tile]) -> tuple[tuple[list[int], list[int]], int, int]:
    """Lengths of queries and keys of each sequence, and where both end."""
    lengths = tuple([span.stop - span.start for span in spans] for spans in zip(*(tile[:2] for tile in tiles), strict=True))
    return lengths, tiles[-1].queries.stop, tiles[-1].keys.stop  # type: ignore[return-value]


@register_kernel("fusion_attention_backward", "aten", devices=("cuda",), declines=_declines_backward)
def backward(
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
    """(dq, dk, dv, nothing) from the result and the statistics, which may be those of more keys than `key`."""
    options = Options(*rest)
    choice = select(query, key, value, options, machine(query.device))
    lse = log_sum_exp(top, total, options).squeeze(-1)
    if choice.kernel == "flash-packed":
        grads = _packed_backward(dout, query, key, value, out, lse[0], options, choice.tiles)
        return *grads, query.new_empty(0)
    run = _flash_backwards if choice.kernel == "flash" else _efficient_backwards
    results_ = views(dout, options, options.head_num), views(out, options, options.head_num), lse
    calls = list(run(query, key, value, results_, options, choice))
    heads = options.head_num, *(key_heads(query, key, options),) * 2
    sizes = [views(tensor, options, count).shape[2] for tensor, count in zip((query, key), heads, strict=False)]
    if len(calls) == 1 and [part.shape[2] for part in calls[0][2][:2]] == sizes:
        return *(arranged(part.to(query.dtype), options.layout) for part in calls[0][2]), query.new_empty(0)
    grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    targets = [views(grad, options, count) for grad, count in zip(grads, heads, strict=True)]
    for rows, keys, parts in calls:
        for target, part, span in zip(targets, parts, (rows, keys, keys), strict=True):
            target[:, :, span] = part
    return *grads, query.new_empty(0)


Gradients = Iterator[tuple[slice, slice, tuple[Tensor, Tensor, Tensor]]]


def _flash_backwards(
    query: Tensor, key: Tensor, value: Tensor, results_: tuple[Tensor, Tensor, Tensor], options: Options, choice: Choice
) -> Gradients:
    heads, probability = key_heads(query, key, options), _probability(options)
    q, k, v = views(query, options, options.head_num), views(key, options, heads), views(value, options, heads)
    for index, tile in enumerate(choice.tiles):
        dout, out, lse = (tensor[:, :, tile.queries] for tensor in results_)
        operands = dout, q[:, :, tile.queries], k[:, :, tile.keys], v[:, :, tile.keys], out, lse
        state = aten.flash_state(q.device, q.dtype, probability, seed_of(options, index))
        common = {"scale": options.scale, "window": tile.window, "probability": probability}
        yield tile.queries, tile.keys, aten.flash_backward(*operands, state, **common)


def _efficient_backwards(
    query: Tensor, key: Tensor, value: Tensor, results_: tuple[Tensor, Tensor, Tensor], options: Options, choice: Choice
) -> Gradients:
    for index, (segment, q, k, v) in enumerate(problems(query, key, value, options)):
        if k.shape[2] == 0:
            continue
        dout, out, lse = (tensor[:, :, segment.queries] for tensor in results_)
        causal, parts = _parts(options, segment, q, k)
        yield segment.queries, segment.keys, aten.efficient_backward(
            dout, q, k, v, out, lse, parts, None,
            scale=options.scale, causal=causal, probability=_probability(options), seed=seed_of(options, index),
        )  # fmt: skip


def _packed_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, options: Options, tiles: Sequence[Tile]
) -> list[Tensor]:
    lengths, q_end, k_end = _lengths(tiles)
    probability = _probability(options)
    parts = aten.flash_packed_backward(
        dout[:q_end], query[:q_end], key[:k_end], value[:k_end], out[:q_end], lse[:, :q_end],
        aten.flash_state(query.device, query.dtype, probability, seed_of(options, 0)), lengths,
        scale=options.scale, window=tiles[0].window, probability=probability,
    )  # fmt: skip
    return [_padded(part, like.shape[0]) for part, like in zip(parts, (query, key, value), strict=True)]


def _padded(part: Tensor, tokens: int) -> Tensor:
    """Zeros after the last sequence."""
    if part.shape[0] == tokens:
        return part.contiguous()
    whole = part.new_zeros(tokens, *part.shape[1:])
    whole[: part.shape[0]] = part
    return whole


def _parts(options: Options, segment: Segment, q: Tensor, k: Tensor) -> tuple[bool, Iterator[aten.Part]]:
    """(whether the upper left triangle says it all, rows with the keys that they see and their additive mask)."""
    queries, keys = q.shape[2], k.shape[2]
    low, high = band(options, segment, queries, keys)
    only_band = options.pse is None and (options.atten_mask is None or segment_mode(options, segment) in (2, 3, 4))
    if only_band and low is None and high in (None, 0):
        return high == 0, iter([(range(queries), range(keys), None)])
    return False, _masked_parts(options, segment, q, queries, keys)


def _masked_parts(options: Options, segment: Segment, q: Tensor, queries: int, keys: int) -> Iterator[aten.Part]:
    low, high = band(options, segment, queries, keys)
    step = aten.rows_per_part(_planes(options, q), keys)
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        first = 0 if low is None else max(0, rows.start + low)
        stop = keys if high is None else min(keys, rows.stop + high)
        if first >= stop:
            continue
        mask = excluded(options, segment, rows, queries, keys, q.device)
        added = bias(options, segment, rows, queries, keys)
        if added is None:
            total = torch.zeros((), dtype=torch.float32, device=q.device)
        else:
            total = added.float() * options.scale if options.pse_type == 1 else added.float()
        if mask is not None:
            total = torch.where(mask, float("-inf"), total)
        total = total.expand(*total.shape[:-2], rows.stop - rows.start, keys)[..., first:stop]
        yield range(rows.start, rows.stop), range(first, stop), total


def _planes(options: Options, q: Tensor) -> int:
    """How many samples times heads have a mask of their own."""
    shapes = []
    if options.pse is not None:
        shapes.append((options.pse.shape[0] if options.pse.dim() != 1 else 1, q.shape[1]))
    if options.atten_mask is not None and options.sparse_mode in (5, 6):
        shapes.append((q.shape[0], 1))
    elif options.atten_mask is not None and options.sparse_mode in (0, 1) and options.atten_mask.dim() == 4:
        shapes.append(tuple(options.atten_mask.shape[:2]))
    return max((own[0] for own in shapes), default=1) * max((own[1] for own in shapes), default=1)
