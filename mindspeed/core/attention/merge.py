"""Join attention over disjoint key sets; exact for any split, in fp32, finite where a side saw no key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mindspeed.core.attention.contract import statistics_dtype

STATISTICS = 8  # equal copies of each statistic, as the kernel of `merge_fused` has them
LOWEST = -1e30  # log-sum-exp of no key: finite, and nothing beside any other


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partial results over the same queries.

    Args:
        out_a, out_b: [B, N, S, D], any float dtype.
        lse_a, lse_b: [B, N, S], fp32; -inf where a row saw no key.

    Returns:
        out in fp32 (fp64 for fp64) and the common log-sum-exp.
    """
    # exp(a - logaddexp(a, b)) and the sigmoid form are NaN for -inf - (-inf); an explicit, finite maximum is not.
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    share_a, share_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = share_a + share_b
    norm = torch.where(total == 0, torch.ones_like(total), total)
    weight_a, weight_b = (share_a / norm).unsqueeze(-1), (share_b / norm).unsqueeze(-1)
    return out_a.to(weight_a.dtype) * weight_a + out_b.to(weight_b.dtype) * weight_b, top + total.log()


def merge_fused(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` as one kernel of the device, `npu_ring_attention_update`, in fp32; same arguments and results."""
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update

    heads, dtype = lse_a.shape[1], statistics_dtype(out_a.dtype)

    def block(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel merges pairs (maximum, sum); (lse, 1) is one. It divides by the sum, which must not be 0 nor -inf - (-inf).
        top = lse.clamp(min=LOWEST).unsqueeze(-1).expand(*lse.shape, STATISTICS).contiguous()
        return out.to(dtype).permute(2, 0, 1, 3).flatten(2), top, torch.ones_like(top)

    out, top, total = npu_ring_attention_update(*block(out_a, lse_a), *block(out_b, lse_b))
    lse = top[..., 0] + total[..., 0].log()
    return out.unflatten(2, (heads, -1)).permute(1, 2, 0, 3), lse.masked_fill(lse <= LOWEST / 2, float("-inf"))


Merge = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Accumulator:
    """Attention of a block of queries, growing tile by tile."""

    def __init__(self, query: Tensor, value_dim: int, merge: Merge = merge) -> None:
        """Start with no key seen, for query [B, N, S, D]; `merge` or `merge_fused` joins the tiles."""
        self._merge = merge
        dtype = statistics_dtype(query.dtype)
        self.out = query.new_zeros((*query.shape[:-1], value_dim), dtype=dtype)
        self.lse = query.new_full(query.shape[:-1], float("-inf"), dtype=dtype)
        self._untouched = True

    def add(self, out: Tensor, lse: Tensor, rows: slice = slice(None), samples: slice = slice(None)) -> None:
        """Merge the result of one more tile that covers `rows` of the queries of `samples`."""
        part = (samples, slice(None), rows)
        if lse.shape != self.lse.shape:
            self._own()
            self.out[part], self.lse[part] = self._merge(self.out[part], self.lse[part], out, lse)
        elif self._untouched:
            self.out, self.lse = out.to(self.out.dtype), lse.to(self.lse.dtype)
        else:
            self.out, self.lse = self._merge(self.out, self.lse, out, lse)
        self._untouched = False

    def _own(self) -> None:
        """Make writing in place safe: the first tile's tensors may be views of a kernel's result."""
        self.out, self.lse = self.out.contiguous(), self.lse.contiguous()
