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
    out = (out_b * weight_b).addcmul_(out_a.to(weight_a.dtype), weight_a)
    return out, top + total.log()


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
    """Attention of a block of queries, growing tile by tile.

    Attributes:
        out: [B, N, S, Dv], fp32 (fp64 for fp64) once tiles were merged, as the kernel returned it while there is only one.
        lse: [B, N, S], fp32 (fp64 for fp64).
    """

    def __init__(self, query: Tensor, value_dim: int, merge: Merge = merge) -> None:
        """Start with no key seen, for query [B, N, S, D]; `merge` or `merge_fused` joins the tiles."""
        self._merge = merge
        self._query, self._value_dim = query, value_dim
        self._total: tuple[Tensor, Tensor] | None = None

    @property
    def out(self) -> Tensor:
        """Attention over the keys of all tiles so far."""
        return self._result()[0]

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the scores of all tiles so far."""
        return self._result()[1]

    def add(self, out: Tensor, lse: Tensor, rows: slice = slice(None), samples: slice = slice(None)) -> None:
        """Merge the result of one more tile that covers `rows` of the queries of `samples`."""
        part, whole = (samples, slice(None), rows), lse.shape == self._query.shape[:-1]
        if whole and self._total is None:
            self._total = out, lse
        elif whole:
            self._total = self._merge(*self._result(), out, lse)
        else:
            total, total_lse = self._result()
            total = total.to(total_lse.dtype)
            total[part], total_lse[part] = self._merge(total[part], total_lse[part], out, lse)
            self._total = total, total_lse

    def _result(self) -> tuple[Tensor, Tensor]:
        if self._total is None:
            query, dtype = self._query, statistics_dtype(self._query.dtype)
            out = query.new_zeros((*query.shape[:-1], self._value_dim), dtype=dtype)
            self._total = out, query.new_full(query.shape[:-1], float("-inf"), dtype=dtype)
        return self._total


class GradientSum:
    """Gradient of a tensor, growing part by part; in fp32 (fp64 for fp64), unless one part is all there is."""

    def __init__(self, like: Tensor) -> None:
        """Start with zero, for a tensor of this shape."""
        self._like, self._total, self._dtype = like, None, statistics_dtype(like.dtype)

    def add(self, part: Tensor, place: tuple[slice, ...] = ()) -> None:
        """Add a part at its place in the tensor."""
        if self._total is None and part.shape == self._like.shape:
            self._total = part
            return
        if self._total is None:
            self._total = torch.zeros_like(self._like, dtype=self._dtype)
        self._total = self._total.to(self._dtype)
        self._total[place].add_(part)

    @property
    def total(self) -> Tensor:
        """The sum so far."""
        return torch.zeros_like(self._like, dtype=self._dtype) if self._total is None else self._total
