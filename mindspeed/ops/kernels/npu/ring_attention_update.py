"""Merge of two attention results through `npu_ring_attention_update`."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from mindspeed.ops._registry import register_kernel
from mindspeed.ops.kernels.npu._versions import known, lacks

NAME = "npu_ring_attention_update"


def _declines(prev_out: Tensor, *rest: object) -> str | None:
    layout, softmax_layout = rest[-2:]
    if reason := lacks(NAME):
        return reason
    if prev_out.dtype == torch.float64:
        return f"{NAME} has no float64"
    if layout == "TND" and prev_out.shape[-1] % 64:
        return f"{NAME} wants a head size that is a multiple of 64 for packed sequences, not {prev_out.shape[-1]}"
    if softmax_layout and not known(NAME, input_softmax_layout=softmax_layout):
        return f"this version of {NAME} takes statistics in sequence blocks only"
    return None


@register_kernel("ring_attention_update", "npu", devices=("npu",), declines=_declines)
def ring_attention_update(
    prev_out: Tensor, prev_max: Tensor, prev_sum: Tensor, cur_out: Tensor, cur_max: Tensor, cur_sum: Tensor,
    actual_seq_qlen: Tensor | None, layout: str, softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(out, max, sum)` over both key sets; actual_seq_qlen: cumulative ends with leading 0."""
    if layout == "TND" and actual_seq_qlen is None:  # by token there are no blocks to know of: one sequence
        actual_seq_qlen = torch.tensor([0, prev_out.shape[0]], dtype=torch.int64, device=prev_out.device)
    return torch_npu.npu_ring_attention_update(
        prev_out, prev_max, prev_sum, cur_out, cur_max, cur_sum, actual_seq_qlen=actual_seq_qlen, input_layout=layout,
        **known(NAME, input_softmax_layout=softmax_layout),
    )  # fmt: skip
