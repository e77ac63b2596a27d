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
    return merge_into(out_a.to(lse_a.dtype, copy=True), lse_a.clone(), out_b, lse_b)


def merge_into(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` in the memory of its first two arguments, both fp32 (fp64 for fp64): large results are passed over once."""
    # A row that neither side saw gives -inf - (-inf) = NaN; its share may be anything finite, since both outputs are 0.
    share = (more_lse - lse).nan_to_num_().sigmoid_().unsqueeze(-1)
    torch.logaddexp(lse, more_lse, out=lse)
    return out.lerp_(more.to(out.dtype), share), lse


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


Merge = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # may write to its first two arguments


class Accumulator:
    """Attention of a block of queries, growing tile by tile.

    Attributes:
        out: [B, N, S, Dv], fp32 (fp64 for fp64) once tiles were merged, as the kernel returned it while there is only one.
        lse: [B, N, S], fp32 (fp64 for fp64).
    """

    def __init__(self, query: Tensor, value_dim: int, merge: Merge = merge_into) -> None:
        """Start with no key seen, for query [B, N, S, D]; `merge_into` or `merge_fused` joins the tiles."""
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
        """Merge the result of one more tile that covers `rows` of the queries of `samples`; takes over its memory."""
        part, whole = (samples, slice(None), rows), lse.shape == self._query.shape[:-1]
        if whole and self._total is None:
            self._total = out, lse
            return
        total, total_lse = self._result()
        total = total.to(total_lse.dtype)
        if whole:
            self._total = self._merge(total, total_lse, out, lse)
            return
        rooms = total[part], total_lse[part]
        for room, merged in zip(rooms, self._merge(*rooms, out, lse), strict=True):
            if merged is not room:
                room.copy_(merged)
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
        self._like, self._dtype = like, statistics_dtype(like.dtype)
        self._only: tuple[Tensor, tuple[slice, ...]] | None = None  # one part and its place: no zeros are filled around it
        self._sum: Tensor | None = None

    def add(self, part: Tensor, place: tuple[slice, ...] = ()) -> None:
        """Add a part at its place in the tensor; takes over its memory."""
        if self._only is None and self._sum is None:
            self._only = part, place
        else:
            self._wide()[place].add_(part)

    def write_to(self, room: Tensor) -> None:
        """Overwrite a tensor with the sum so far."""
        if self._sum is None and not self._is_all():
            room.zero_()
            self.add_to(room)
        else:
            room.copy_(self.total)

    def add_to(self, room: Tensor) -> None:
        """Add the sum so far to a tensor."""
        if self._sum is not None:
            room.add_(self._sum)
        elif self._only is not None:
            part, place = self._only
            room[place].add_(part)

    @property
    def total(self) -> Tensor:
        """The sum so far."""
        if self._only is None and self._sum is None:
            return torch.zeros_like(self._like, dtype=self._dtype)
        return self._only[0] if self._only is not None and self._is_all() else self._wide()

    def _is_all(self) -> bool:
        """Whether the one part covers the tensor."""
        return self._only is not None and self._only[0].shape == self._like.shape

    def _wide(self) -> Tensor:
        """The sum as one tensor in the wide dtype."""
        if self._sum is None:
            assert self._only is not None
            part, place = self._only
            if self._is_all():
                self._sum = part.to(self._dtype)
            else:
                self._sum = torch.zeros_like(self._like, dtype=self._dtype)
                self._sum[place].copy_(part)
            self._only = None
        return self._sum
