"""Attention with the interface of the second version of the NPU's fused operator, on every device."""

# B batch, N query heads, Sq / Sk positions, D head size, T tokens of a packed batch

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _attention_cuda, _attention_flash, _checks  # noqa: F401  (both register bodies)
from mindspeed.ops._attention import out_shape, random_state, statistics_shape
from mindspeed.ops._attention_scores import COMPRESSED_ROWS, LIMIT, Options, strip
from mindspeed.ops._softmax_statistics import block_index, lengths_of, to_blocks, to_tokens

OP, GRAD = "npu_fusion_attention", "npu_fusion_attention_grad"
LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = LIMIT,
    next_tokens: int = LIMIT,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """`(out, softmax_max, softmax_sum, empty, seed, offset, numels)`; the page docs/ops/fusion_attention_v2.md has the details.

    query [.., N, D], key [.., Nkv, D], value [.., Nkv, Dv] in one of the layouts BSH, SBH, BSND, BNSD or TND (packed
    sequences; needs `actual_seq_qlen` and `actual_seq_kvlen`, cumulative ends). head_num: N, a multiple of Nkv. atten_mask:
    True = excluded; without it `sparse_mode` has no effect. The statistics are [B, N, Sq, 8] float32 (TND: [T, N, 8], laid out
    as one [N, s, 8] block per sequence) and satisfy `softmax_max + log(softmax_sum) = logsumexp(scores)`. A row that sees
    nothing gives 0, minus infinity and 0. Differentiable in query, key, value and pse (types 0 and 1).
    """
    given = Options(
        head_num, input_layout, pse, atten_mask, scale, keep_prob, pre_tokens, next_tokens, inner_precise, prefix,
        actual_seq_qlen, actual_seq_kvlen, sparse_mode, pse_type, q_start_idx, kv_start_idx, rng=None,
    )  # fmt: skip
    options = _checked(OP, query, key, value, padding_mask, given)
    count = _numels(query, key, options)
    rng = random_state(query, count, keep_prob)
    out, top, total = torch.ops.mindspeed.fusion_attention(query, key, value, *options[:-1], rng)
    if options.layout == "TND":
        index = block_index(lengths_of(options.actual_seq_qlen, query.device), *top.shape[:2])
        top, total = to_blocks(top, index), to_blocks(total, index)
    seed, offset, numels = (0, 0, 0) if rng is None else (*rng.tolist(), count)
    return out, top, total, query.new_empty(0), seed, offset, numels


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_outputs: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = LIMIT,
    next_tokens: int = LIMIT,
    inner_precise: int = 0,
    seed: int = 1234,
    offset: int = 0,
    numels: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, dpse)` from the result `attention_in` and its statistics; dpse is None without pse of type 0 or 1.

    Statistics and result may belong to a larger set of keys than `key` (ring attention): the probabilities are then those of
    the whole set, restricted to these keys.
    """
    given = Options(
        head_num, input_layout, pse, atten_mask, scale, keep_prob, pre_tokens, next_tokens, inner_precise, prefix,
        actual_seq_qlen, actual_seq_kvlen, sparse_mode, pse_type, q_start_idx, kv_start_idx, rng=None,
    )  # fmt: skip
    options = _checked(GRAD, query, key, value, padding_mask, given)
    _check_results(query, key, value, grad_outputs, softmax_max, softmax_sum, attention_in, options)
    if options.layout == "TND":
        index = block_index(lengths_of(options.actual_seq_qlen, query.device), *softmax_max.shape[:2])
        softmax_max, softmax_sum = to_tokens(softmax_max, index), to_tokens(softmax_sum, index)
    rng = torch.tensor([seed, offset], dtype=torch.int64, device="cpu") if keep_prob < 1.0 else None
    need_dpse = pse is not None and pse_type in (0, 1)
    dq, dk, dv, dpse = torch.ops.mindspeed.fusion_attention_backward(
        grad_outputs, query, key, value, attention_in, softmax_max, softmax_sum, need_dpse, *options[:-1], rng
    )
    return dq, dk, dv, dpse if need_dpse else None


def _check_results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_outputs: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    attention_in: Tensor,
    options: Options,
) -> None:
    """Check what `npu_fusion_attention_grad` gets from the forward and from behind."""
    for name, tensor in (("grad_outputs", grad_outputs), ("attention_in", attention_in)):
        _checks.tensor(GRAD, name, tensor)
        _checks.dtype_of(GRAD, name, tensor, query.dtype)
        _checks.shape(GRAD, name, tensor, out_shape(query, key, value, options))
    for name, tensor in (("softmax_max", softmax_max), ("softmax_sum", softmax_sum)):
        _checks.tensor(GRAD, name, tensor, (torch.float32, torch.float64))
        _checks.shape(GRAD, name, tensor, statistics_shape(query, options))
    _checks.same_device(
        GRAD,
        query=query,
        grad_outputs=grad_outputs,
        attention_in=attention_in,
        softmax_max=softmax_max,
        softmax_sum=softmax_sum,
    )


def _checked(op: str, query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None, given: Options) -> Options:
    """Check everything; returns the options with the layout in capitals and the lists as lists of int."""
    _checks.tensor(op, "query", query)
    for name, tensor in (("key", key), ("value", value)):
        _checks.tensor(op, name, tensor)
        _checks.dtype_of(op, name, tensor, query.dtype)
    pse, mask, mode = given.pse, given.atten_mask, given.sparse_mode
    _checks.same_device(op, query=query, key=key, value=value, pse=pse, atten_mask=mask)
    layout = _checks.word(op, "input_layout", given.layout, LAYOUTS)
    _checks.require(op, "padding_mask", padding_mask is None, "must be None", "a tensor")
    _checks.require(op, "keep_prob", 0.0 < given.keep_prob <= 1.0, "must lie in (0, 1]", given.keep_prob)
    _checks.option(op, "pse_type", given.pse_type, (0, 1, 2, 3))
    _checks.option(op, "sparse_mode", mode, (0, 1, 2, 3, 4, 6, 7, 8) if layout == "TND" else range(7))
    prefix, q_ends, k_ends, q_starts, k_starts = (
        None if values is None else [int(value) for value in values]
        for values in (given.prefix, given.actual_seq_qlen, given.actual_seq_kvlen, given.q_start_idx, given.kv_start_idx)
    )
    batch, queries, keys = _check_shapes(op, query, key, value, given.head_num, layout, q_ends, k_ends)
    if mask is not None:
        _check_mask(op, mask, mode, batch, given.head_num, queries, keys)
        fits = mode not in (5, 6) or (prefix is not None and len(prefix) == batch)
        _checks.require(op, "prefix", fits, f"must have {batch} entries in mode 5 and 6", prefix)
    if pse is not None:
        _checks.require(op, "pse", mode not in (7, 8), "must be None in sparse modes 7 and 8", "a tensor")
        _check_pse(op, pse, given.pse_type, query.dtype, batch, given.head_num, queries, keys)
    return Options(
        given.head_num, layout, pse, mask, *given[4:9], prefix, q_ends, k_ends, mode, given.pse_type, q_starts, k_starts, None
    )


def _check_shapes(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    layout: str,
    q_ends: list[int] | None,
    k_ends: list[int] | None,
) -> tuple[int, int, int]:
    """Check the three shapes; returns batch size, query and key positions (TND: of the longest sequence)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(op, name, tensor, ndim=4 if layout in ("BSND", "BNSD") else 3)
    _checks.require(op, "head_num", head_num > 0, "must be positive", head_num)
    if layout in ("BSH", "SBH"):
        _checks.require(
            op, "head_num", query.shape[-1] % head_num == 0, f"must divide the hidden size {query.shape[-1]}", head_num
        )
        size = query.shape[-1] // head_num
        _checks.require(op, "query", size > 0, "must have a hidden size above 0", tuple(query.shape))
        _checks.require(op, "key", key.shape[-1] % size == 0, f"must have a hidden size divisible by {size}", tuple(key.shape))
        kv_heads = key.shape[-1] // size
    else:
        axis = 1 if layout in ("BNSD", "TND") else 2
        _checks.require(op, "query", query.shape[axis] == head_num, f"must have {head_num} heads", tuple(query.shape))
        _checks.require(op, "key", key.shape[-1] == query.shape[-1], "must have the head size of query", tuple(key.shape))
        kv_heads = key.shape[axis]
        _checks.require(op, "value", value.shape[axis] == kv_heads, f"must have {kv_heads} heads like key", tuple(value.shape))
    _checks.require(
        op, "head_num", kv_heads > 0 and head_num % kv_heads == 0, f"must be a multiple of the {kv_heads} key heads", head_num
    )
    _checks.shape(op, "value", value, (*key.shape[:-1], value.shape[-1]))
    if layout == "TND":
        return _check_lengths(op, query, key, q_ends, k_ends)
    batch_axis, sequence_axis = {"BSH": (0, 1), "BSND": (0, 1), "SBH": (1, 0), "BNSD": (0, 2)}[layout]
    same = key.shape[batch_axis] == query.shape[batch_axis]
    _checks.require(op, "key", same, f"must have batch size {query.shape[batch_axis]}", tuple(key.shape))
    return query.shape[batch_axis], query.shape[sequence_axis], key.shape[sequence_axis]


def _check_lengths(
    op: str, query: Tensor, key: Tensor, q_ends: list[int] | None, k_ends: list[int] | None
) -> tuple[int, int, int]:
    longest = []
    for name, ends, tensor in (("actual_seq_qlen", q_ends, query), ("actual_seq_kvlen", k_ends, key)):
        _checks.require(op, name, bool(ends), "must hold cumulative ends for layout TND", ends)
        used = strip(ends)
        ordered = all(start <= end for start, end in zip([0, *used[:-1]], used, strict=bool(used)))
        _checks.require(
            op, name, ordered and (used or [0])[-1] <= tensor.shape[0], f"must rise to at most {tensor.shape[0]}", ends
        )
        longest.append(max([0, *(end - start for start, end in zip([0, *used[:-1]], used, strict=bool(used)))]))
    _checks.require(op, "actual_seq_kvlen", len(q_ends) == len(k_ends), f"must have {len(q_ends)} entries", len(k_ends))
    return len(strip(q_ends)), *longest


def _check_mask(op: str, mask: Tensor, mode: int, batch: int, heads: int, queries: int, keys: int) -> None:
    _checks.tensor(op, "atten_mask", mask, (torch.bool, torch.uint8))
    if mode not in (0, 1):
        return  # a constant pattern, of which only the mode matters
    sizes = tuple(mask.shape)
    fits = len(sizes) in (2, 4) and sizes[-2] >= queries and sizes[-1] >= keys
    if len(sizes) == 4:
        fits = fits and sizes[0] in (1, batch) and sizes[1] in (1, heads)
    _checks.require(op, "atten_mask", fits, f"must be [Sq, Sk] or [B or 1, N or 1, Sq, Sk] for Sq {queries}, Sk {keys}", sizes)


def _check_pse(
    op: str, pse: Tensor, pse_type: int, dtype: torch.dtype, batch: int, heads: int, queries: int, keys: int
) -> None:
    if pse_type in (2, 3):
        _checks.tensor(op, "pse", pse, (torch.float32,))
        _checks.shape(op, "pse", pse, (heads,), (batch, heads))
        return
    _checks.tensor(op, "pse", pse, ndim=4)
    _checks.dtype_of(op, "pse", pse, dtype)
    rows_fit = pse.shape[2] in (1, queries) or (pse.shape[2] == COMPRESSED_ROWS and queries > COMPRESSED_ROWS)
    fits = pse.shape[0] in (1, batch) and pse.shape[1] == heads and rows_fit and pse.shape[3] == keys
    _checks.require(
        op,
        "pse",
        fits,
        f"must be [B or 1, N, Sq, 1 or {COMPRESSED_ROWS}, Sk] for N {heads}, Sq {queries}, Sk {keys}",
        tuple(pse.shape),
    )


def _numels(query: Tensor, key: Tensor, options: Options) -> int:
    """How many random numbers dropout of all scores takes."""
    if options.layout != "TND":
        batch_axis, sequence_axis = {"BSH": (0, 1), "BSND": (0, 1), "SBH": (1, 0), "BNSD": (0, 2)}[options.layout]
        return query.shape[batch_axis] * options.head_num * query.shape[sequence_axis] * key.shape[sequence_axis]
    lists = (lengths_of(ends, torch.device("cpu")).tolist() for ends in (options.actual_seq_qlen, options.actual_seq_kvlen))
    return options.head_num * sum(q * k for q, k in zip(*lists, strict=False))
