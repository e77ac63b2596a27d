"""Attention through `npu_fusion_attention_v2` and `npu_fusion_attention_grad_v2`; dropout masks are never kept."""

# B batch, N query heads, Sq / Sk positions, T tokens of a packed batch

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._attention_scores import Options, segments, strip
from mindspeed.ops._registry import register_kernel
from mindspeed.ops._softmax_statistics import block_index, lengths_of, to_blocks, to_tokens
from mindspeed.ops.fusion_attention_v2 import _numels
from mindspeed.ops.kernels.npu._versions import cannot_take, known, lacks

FORWARD, BACKWARD = "npu_fusion_attention_v2", "npu_fusion_attention_grad_v2"
SEQUENCE_AXIS = {"BSH": 1, "BSND": 1, "SBH": 0, "BNSD": 2, "TND": 0}
SLOPES = (2, 3)
"""Values of pse_type with which the kernels make the position bias from slopes."""
MOST_HEADS, LARGEST_HEAD = 256, 768
ROWS_WITHOUT_KEYS = 2
"""Value of inner_precise with which the kernels give zeros for query rows that see no key."""


def _common(query: Tensor, key: Tensor, options: Options) -> dict[str, object]:
    """Keyword arguments of both kernels."""
    return {
        "pse": options.pse,
        "atten_mask": options.atten_mask,
        "keep_prob": options.keep_prob,
        "pre_tokens": options.pre_tokens,
        "next_tokens": options.next_tokens,
        "inner_precise": options.inner_precise or (ROWS_WITHOUT_KEYS if _may_see_nothing(query, key, options) else 0),
        "prefix": options.prefix,
        "actual_seq_qlen": options.actual_seq_qlen,
        "actual_seq_kvlen": options.actual_seq_kvlen,
        "sparse_mode": options.sparse_mode,
        "pse_type": options.pse_type,
        "q_start_idx": options.q_start_idx,
        "kv_start_idx": options.kv_start_idx,
    }


def _lengths(query: Tensor, key: Tensor, options: Options) -> Iterator[tuple[int, int]]:
    """Number of queries and keys of the batch, or of each packed sequence that has queries."""
    axis = SEQUENCE_AXIS[options.layout]
    for part in segments(query.shape[axis], key.shape[axis], options):
        yield part.queries.stop - part.queries.start, part.keys.stop - part.keys.start


def _may_see_nothing(query: Tensor, key: Tensor, options: Options) -> bool:
    """Whether the mask can exclude all keys of some query row; contents of masks are not read."""
    if options.atten_mask is None or options.sparse_mode == 2:
        return False
    if options.sparse_mode not in (3, 4):
        return True
    future = 0 if options.sparse_mode == 3 else options.next_tokens
    band_is_left = options.sparse_mode == 4 and options.pre_tokens < 0
    # the first row sees keys up to its place on the diagonal, which ends in the lower right corner, plus `future`
    return band_is_left or any(keys == 0 or keys - queries + future < 0 for queries, keys in _lengths(query, key, options))


def _declines(query: Tensor, key: Tensor, *rest: object) -> str | None:
    """The same answer in forward and backward, whose dropout masks must agree."""
    options = Options(*rest)
    if reason := lacks(FORWARD) or lacks(BACKWARD) or cannot_take(FORWARD, query):
        return reason
    if options.head_num > MOST_HEADS:
        return f"{FORWARD} takes at most {MOST_HEADS} heads, not {options.head_num}"
    size = query.shape[-1] // (options.head_num if options.layout in ("BSH", "SBH") else 1)
    if size > LARGEST_HEAD:
        return f"{FORWARD} takes head sizes up to {LARGEST_HEAD}, not {size}"
    if options.pse is None:
        return None
    if options.pse_type in SLOPES and any(queries != keys for queries, keys in _lengths(query, key, options)):
        return f"{FORWARD} makes position biases for as many queries as keys only"
    if options.layout == "TND" and any(map(_has_empty, (options.actual_seq_qlen, options.actual_seq_kvlen))):
        return f"{FORWARD} takes no position bias with empty sequences"
    return None


def _has_empty(ends: list[int]) -> bool:
    """Whether one of these packed sequences has no tokens."""
    ends = strip(ends)
    return any(start == end for start, end in zip([0, *ends], ends, strict=False))


def _token_statistics(options: Options, name: str) -> dict[str, str]:
    """The argument that makes the kernel arrange statistics of packed sequences by token, if this version has it."""
    return known(name, softmax_layout="TND") if options.layout == "TND" else {}


@contextlib.contextmanager
def _drawing_from(rng: Tensor | None, device: torch.device) -> Iterator[None]:
    """Have the kernel draw its mask at the kept random state: it takes seed and offset from the default generator."""
    if rng is None:
        yield
        return
    generator = torch_npu.npu.default_generators[device.index or 0]
    seed, offset = rng.tolist()
    state = generator.get_state()
    generator.manual_seed(seed)
    generator.set_offset(offset)
    try:
        yield
    finally:
        generator.set_state(state)


@register_kernel(
    "fusion_attention",
    "npu",
    devices=("npu",),
    declines=lambda query, key, value, *rest: _declines(query, key, *rest),
)
def fusion_attention(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """Forward; statistics [B, N, Sq, 8], or [T, N, 8] by token."""
    options = Options(*rest)
    by_token = _token_statistics(options, FORWARD)
    with _drawing_from(options.rng, query.device):
        out, top, total, *_ = torch_npu.npu_fusion_attention_v2(
            query, key, value, options.head_num, options.layout, scale=options.scale, **_common(query, key, options), **by_token
        )
    if options.layout == "TND" and not by_token:
        index = block_index(lengths_of(options.actual_seq_qlen, query.device), *top.shape[:2])
        top, total = to_tokens(top, index), to_tokens(total, index)
    return out, top, total


@register_kernel(
    "fusion_attention_backward",
    "npu",
    devices=("npu",),
    declines=lambda dout, query, key, value, out, top, total, need_dpse, *rest: _declines(query, key, *rest),
)
def fusion_attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, top: Tensor, total: Tensor, need_dpse: bool,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and, if wanted, pse; statistics may be those of a larger set of keys."""
    options = Options(*rest)
    by_token = _token_statistics(options, BACKWARD)
    if options.layout == "TND" and not by_token:
        index = block_index(lengths_of(options.actual_seq_qlen, query.device), *top.shape[:2])
        top, total = to_blocks(top, index), to_blocks(total, index)
    seed, offset = (0, 0) if options.rng is None else options.rng.tolist()
    dq, dk, dv, dpse, *_ = torch_npu.npu_fusion_attention_grad_v2(
        query, key, value, dout.contiguous(), options.head_num, options.layout, softmax_max=top, softmax_sum=total,
        attention_in=out, scale_value=options.scale, seed=seed, offset=offset,
        numels=0 if options.rng is None else _numels(query, key, options), **_common(query, key, options), **by_token,
    )  # fmt: skip
    return dq, dk, dv, dpse if need_dpse else query.new_empty(0)
