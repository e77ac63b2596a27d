"""Body of `fusion_attention` on aten's flash kernel for the CPU, which returns a log-sum-exp and takes one back."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops._attention import key_heads, log_sum_exp, problems, results, statistics_view, views
from mindspeed.ops._attention_scores import Options, Segment, band, bias, excluded
from mindspeed.ops._registry import register_kernel

SHORT = 32
"""Below about one vector of keys and without a mask, aten's kernel takes a row of NaN for one that sees nothing and gives 0."""


def _no_flash(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> str | None:
    options = Options(*rest)
    if options.keep_prob < 1.0:
        return "aten's flash attention on CPU has no dropout"
    kv_heads = key_heads(query, key, options)
    if views(query, options, options.head_num).shape[-1] != views(value, options, kv_heads).shape[-1]:
        return "aten's flash attention on CPU wants equal head sizes of query and value"
    return None


def _no_flash_backward(
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
    return "the gradient of pse is wanted" if need_dpse else _no_flash(query, key, value, *rest)


def _dense(value: Tensor) -> Tensor:
    """aten's kernel takes the last stride for 1, whatever it is, also that of a result laid out like an input whose rows overlap."""
    apart = all(step == 0 or step >= value.shape[-1] for step in value.stride()[:-1])
    return value if value.stride(-1) == 1 and apart else value.contiguous()


def _flash_mask(options: Options, segment: Segment, q: Tensor, k: Tensor) -> tuple[bool, Tensor | None, Tensor | None]:
    """`(is_causal, additive mask, rows that see nothing)` for aten's kernel."""
    queries, keys = q.shape[2], k.shape[2]
    rows = slice(0, queries)
    low, high = band(options, segment, queries, keys)
    mask = excluded(options, segment, rows, queries, keys, q.device)
    added = bias(options, segment, rows, queries, keys)
    short = keys < SHORT
    if mask is None and added is None and not short:
        return False, None, None
    if not short and added is None and low is None and high == 0 and mask.dim() == 2 and options.sparse_mode >= 2:
        return True, None, None
    additive = torch.zeros((queries, keys) if short else (), dtype=torch.float32 if q.dtype != torch.float64 else q.dtype)
    if added is not None:
        additive = additive + added.to(additive.dtype) * (options.scale if options.pse_type == 1 else 1.0)
    blind = None
    if mask is not None:
        blind = mask.all(-1, keepdim=True)
        additive = torch.where(mask, float("-inf"), additive)
    additive = additive[(None,) * (4 - additive.dim())]
    return False, additive.expand(-1, -1, queries, keys), blind


@register_kernel("fusion_attention", "aten", devices=("cpu",), declines=_no_flash)
def _flash(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*rest)
    out, top, total = results(query, key, value, options)
    targets = views(out, options, options.head_num), statistics_view(top, options), statistics_view(total, options)
    for segment, q, k, v in problems(query, key, value, options):
        if k.shape[2] == 0:
            continue
        causal, mask, blind = _flash_mask(options, segment, q, k)
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_dense, (q, k, v)), 0.0, causal, attn_mask=mask, scale=options.scale
        )
        lse, ones = lse.unsqueeze(-1), 1.0
        if blind is not None:  # the kernel reports 0 for rows that see nothing
            lse, ones = lse.masked_fill(blind, float("-inf")), (~blind).to(top.dtype)
        segment_out, segment_top, segment_total = (target[:, :, segment.queries] for target in targets)
        segment_out.copy_(part)
        segment_top.copy_(lse)
        segment_total.copy_(ones) if blind is not None else segment_total.fill_(1.0)
    return out, top, total


@register_kernel("fusion_attention_backward", "aten", devices=("cpu",), declines=_no_flash_backward)
def _flash_backward(
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
    grads = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
    targets = [views(grad, options, heads) for grad, heads in zip(grads, (options.head_num, kv_heads, kv_heads), strict=True)]
    dout_view, out_view = views(dout, options, options.head_num), views(out, options, options.head_num)
    lse = log_sum_exp(top, total, options)
    lse = lse.masked_fill(lse == float("-inf"), 0.0).squeeze(-1)  # such rows have no finite score, so their weights are 0
    for segment, q, k, v in problems(query, key, value, options):
        if k.shape[2] == 0:
            continue
        causal, mask, _ = _flash_mask(options, segment, q, k)
        rows = segment.queries
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_dense, (dout_view[:, :, rows], q, k, v, out_view[:, :, rows])),
            lse[:, :, rows],
            0.0,
            causal,
            attn_mask=mask,
            scale=options.scale,
        )
        for target, part, span in zip(targets, parts, (rows, segment.keys, segment.keys), strict=True):
            target[:, :, span] = part
    return *grads, query.new_empty(0)
