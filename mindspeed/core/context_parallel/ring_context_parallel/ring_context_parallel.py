"""Ring attention for programs that bring their own groups: plain and double rings, equal and unequal blocks.

out = ringattn_context_parallel(q, k, v, heads, {
    "causal": True, "cp_group": group, "cp_size": size, "rank": rank, "cp_global_ranks": ranks,
})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed.core.attention import Dropout
from mindspeed.core.context_parallel.exchange import Exchange
from mindspeed.core.context_parallel.gathered_attention import sequence_first
from mindspeed.core.context_parallel.groups import check_alike
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.packed import packed_layout
from mindspeed.core.context_parallel.plan import RING, ContextPlan
from mindspeed.core.context_parallel.ring_attention import RingContext, ring_attention
from mindspeed.core.context_parallel.work import AttentionOptions

REQUIRED = ("causal", "cp_group", "cp_size", "rank", "cp_global_ranks")
OPTIONAL = (
    "cp_inner_ranks",
    "cp_outer_ranks",
    "cp_dkv_outer_ranks",
    "cp_group_for_intra_window",
    "cp_group_for_intra_window_send_recv_overlap",
    "cp_group_for_send_recv_overlap",
    "megatron_cp_in_bnsd",
    "cache_policy",
    "kv_gradient_dtype",
    "pse",
    "pse_type",
)
DISTANCES = {None: "absolute", 0: "absolute", 2: "absolute", 3: "root"}
Shapes = Sequence[int] | Mapping[int, int]


def ringattn_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: int,
    cp_para: Mapping[str, Any],
    softmax_scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    packed_seq_params: Any = None,
    shapes: Shapes | None = None,
) -> Tensor:
    """Attention over a sequence whose blocks live on the ranks of a group; differentiable in q, k and v.

    Args:
        q: [s, b, n x d], this rank's tokens: chunks r and 2R - 1 - r of 2R when causal, block r otherwise.
        k, v: [s, b, g x d] and [s, b, g x dv]; n is a multiple of g.
        n: query heads.
        cp_para: `causal`, `cp_group`, `cp_size`, `rank` and `cp_global_ranks`; for a double ring `cp_inner_ranks` (global
            ranks of the window), its groups, and the ranks between windows; `cache_policy` (None, "full", "half");
            `kv_gradient_dtype` (None for fp32, or torch.bfloat16: what gradients of k and v travel in; not in the original);
            `pse` (ALiBi slopes [n]) with `pse_type` 0, 2 or 3. `megatron_cp_in_bnsd` changes no number.
        softmax_scale: 1 / sqrt(d) by default.
        attn_mask: bool [S, S] or [1 or b, 1, S, S], True where hidden; replaces the causal rule. Blocks are contiguous then.
        dropout_p: of attention weights; one seed is drawn from the device's default generator.
        packed_seq_params: `cu_seqlens_q` and `cu_seqlens_q_padded` (or None) of sequences in one row; b = 1.
        shapes: tokens of each rank, where blocks are unequal and contiguous.

    Returns:
        [s, b, n x dv] in q's dtype.

    Raises:
        ValueError: keys or numbers that do not fit together.
    """
    group, rank = _check(cp_para)
    dim = q.shape[-1] // n
    query, key, value = _with_heads(q, n), _with_heads(k, k.shape[-1] // dim), _with_heads(v, k.shape[-1] // dim)
    layout = _layout(cp_para, q, attn_mask, packed_seq_params, shapes)
    context = RingContext(
        Exchange(group, cp_para.get("cp_group_for_send_recv_overlap")),
        rank,
        layout,
        AttentionOptions(
            1.0 / math.sqrt(dim) if softmax_scale is None else softmax_scale,
            Dropout(dropout_p, _draw_seed(q)) if dropout_p else None,
            cp_para.get("pse"),
            DISTANCES[cp_para.get("pse_type")],
        ),
        inner=_inner_exchange(cp_para),
        window=len(cp_para.get("cp_inner_ranks") or (rank,)),
        cache=cp_para.get("cache_policy") or "none",
        gradient_dtype=cp_para.get("kv_gradient_dtype"),
    )
    if layout.sizes is None:
        check_alike(group, q=query, k=key, v=value)
    else:  # messages are equally long; what is padded is in no tile
        missing = max(layout.sizes) - layout.sizes[rank]
        key, value = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (key, value))
        check_alike(group, shapes=layout.sizes, k=key, v=value)
    return sequence_first(ring_attention(query, key, value, context)).flatten(2)


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    """[s, b, heads x d] -> [b, heads, s, d], a view."""
    return tensor.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _draw_seed(like: Tensor) -> int:
    return int(torch.randint(0, 2**62, (), device=like.device).item())


def _check(cp_para: Mapping[str, Any]) -> tuple[dist.ProcessGroup, int]:
    """The group and this rank's place in it; what `cp_para` says must be so."""
    missing = [name for name in REQUIRED if name not in cp_para]
    unknown = sorted(set(cp_para) - {*REQUIRED, *OPTIONAL})
    if missing or unknown:
        raise ValueError(f"ringattn_context_parallel: cp_para lacks {missing} and has unknown {unknown}; known: {OPTIONAL}")
    group = cp_para["cp_group"]
    ranks, rank = list(dist.get_process_group_ranks(group)), dist.get_rank(group)
    said = (cp_para["cp_size"], cp_para["rank"], list(cp_para["cp_global_ranks"]))
    if said != (len(ranks), rank, ranks):
        raise ValueError(
            f"ringattn_context_parallel: cp_size, rank and cp_global_ranks say {said}, the group is {(len(ranks), rank, ranks)}"
        )
    policy, kind = cp_para.get("cache_policy"), cp_para.get("pse_type")
    if policy not in (None, "full", "half"):
        raise ValueError(f"ringattn_context_parallel: cache_policy {policy!r} is neither None, 'full' nor 'half'")
    if cp_para.get("kv_gradient_dtype") not in (None, torch.bfloat16):
        raise ValueError(
            f"ringattn_context_parallel: kv_gradient_dtype {cp_para['kv_gradient_dtype']!r} is neither None (fp32) nor "
            f"torch.bfloat16"
        )
    if kind not in DISTANCES:
        raise ValueError(f"ringattn_context_parallel: pse_type {kind!r} is none of 0, 2 and 3")
    window = list(cp_para.get("cp_inner_ranks") or ranks[rank : rank + 1])
    start = rank // len(window) * len(window)
    if len(ranks) % len(window) or window != ranks[start : start + len(window)]:
        raise ValueError(f"ringattn_context_parallel: cp_inner_ranks {window} are no window of the ring {ranks}")
    return group, rank


def _inner_exchange(cp_para: Mapping[str, Any]) -> Exchange | None:
    inner = cp_para.get("cp_group_for_intra_window")
    if inner is None:
        return None
    return Exchange(inner, cp_para.get("cp_group_for_intra_window_send_recv_overlap"), addresses=cp_para["cp_group"])


def _layout(cp_para: Mapping[str, Any], q: Tensor, mask: Tensor | None, packed: Any, shapes: Shapes | None) -> SequenceLayout:
    """Where tokens live, and what is visible."""
    size, rank = cp_para["cp_size"], cp_para["rank"]
    future = 0 if cp_para["causal"] else None
    if packed is not None:
        if shapes is not None or mask is not None or q.shape[1] != 1:
            raise ValueError("ringattn_context_parallel: packed_seq_params go with b = 1, without shapes and attn_mask")
        padded = getattr(packed, "cu_seqlens_q_padded", None)
        maker = LayoutMaker(ContextPlan(RING, size))
        ends = packed.cu_seqlens_q.tolist()
        layout = packed_layout(maker, q.shape[0] * size, ends, None if padded is None else padded.tolist())
        return SequenceLayout(
            layout.length,
            ring=size,
            placement=layout.placement,
            future=future,
            boundaries=layout.boundaries,
            cuts=layout.cuts,
        )
    if shapes is not None:
        sizes = tuple(int(shapes[block]) for block in range(size)) if len(shapes) == size else tuple(shapes)
        if len(sizes) != size or sizes[rank] != q.shape[0]:
            raise ValueError(
                f"ringattn_context_parallel: shapes {list(sizes)} must list {size} lengths; rank {rank} holds {q.shape[0]} tokens"
            )
        return SequenceLayout(sum(sizes), ring=size, placement="contiguous", future=future, sizes=sizes, custom_mask=mask)
    placement = "zigzag" if cp_para["causal"] and mask is None else "contiguous"
    return SequenceLayout(q.shape[0] * size, ring=size, placement=placement, future=future, custom_mask=mask)
