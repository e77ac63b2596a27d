"""Ulysses attention for any local attention: exchange, attend to the whole sequence with some heads, exchange back.

Lengths and head counts need not divide by the number of ranks; see `GatherSizeCalculator`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed.core.context_parallel.groups import check_alike
from mindspeed.core.context_parallel.ulysses_context_parallel.unaligned_cp.mapping import all_to_all


class GatherSizeCalculator(ABC):
    """Tells the global length of the gathered dimension from the arguments of the attention call."""

    @abstractmethod
    def calculate(self, *args: Any, **kwargs: Any) -> int | None:
        """Global length, or None when every rank holds equally much. Receives what follows q, k, v."""


class DefaultGatherSizeCalculator(GatherSizeCalculator):
    """Every rank holds equally much."""

    def calculate(self, *args: Any, **kwargs: Any) -> int | None:
        """None."""
        return None


class DynamicGatherSizeCalculator(GatherSizeCalculator):
    """The global length is the last dimension of the attention mask (first argument or `attention_mask=`)."""

    def calculate(self, *args: Any, **kwargs: Any) -> int | None:
        """Number of keys of the mask; None without a mask, or with the library's own compressed one."""
        mask = args[0] if args else kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or getattr(mask, "is_compressed_causal_mask", False):
            return None
        return mask.shape[-1]


@contextmanager
def exchanged_again(pairs: Sequence[tuple[Tensor, Tensor]], exchange: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Save the second tensor of a pair where autograd would save the first; backward makes the first again.

    Args:
        pairs: (what the block computes with, what it was made from).
        exchange: makes the first from the second, with the same strides.
    """
    sources = {whole.untyped_storage()._cdata: source.detach() for whole, source in pairs}

    def pack(tensor: Tensor) -> Any:
        source = sources.get(tensor.untyped_storage()._cdata)
        return tensor if source is None else (source, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        source, shape, stride, offset = packed
        with torch.no_grad():
            return exchange(source).as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class UlyssesContextAttention(torch.nn.Module):
    """Wrap an attention so that it works on a sequence split over a process group.

    Args:
        local_attention: called with q, k, v of the whole sequence and this rank's heads, and the further arguments.
        sequence_process_group: ranks that share a sequence.
        scatter_idx: dimension of heads, cut before attention.
        gather_idx: dimension of the sequence, whole inside attention.
        gather_size_calculator: tells the global length when pieces are unequal.
        cache_policy: None keeps for backward what the local attention keeps; "full" keeps keys and values as they were
            before the exchange and exchanges them again in backward, "half" keys only. Needs equal pieces.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor],
        sequence_process_group: ProcessGroup,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        gather_size_calculator: GatherSizeCalculator | None = None,
        cache_policy: str | None = None,
    ) -> None:
        super().__init__()
        if cache_policy not in (None, "full", "half"):
            raise ValueError(f"ulysses: cache_policy {cache_policy!r} is neither None, 'full' nor 'half'")
        self.cache_policy = cache_policy
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx = scatter_idx
        self.gather_idx = gather_idx
        self.gather_size_calculator = gather_size_calculator or DefaultGatherSizeCalculator()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention of this rank's piece of the sequence.

        Args:
            query, key, value: [s, b, heads, d] or [s, b, heads x d], the piece of this rank.

        Returns:
            As the local attention returns it, with the sequence cut and all heads, in the shape of the query's kind.

        Raises:
            ValueError: heads do not divide where they must, a piece has an impossible length, or ranks disagree on the total.
        """
        world = dist.get_world_size(self.spg)
        total = self.gather_size_calculator.calculate(*args, **kwargs)
        if total is not None and self.cache_policy is not None:
            raise ValueError(
                f"ulysses: cache_policy {self.cache_policy} needs equal pieces, but the gather-size calculator says {total} tokens; "
                "remove the policy or use DefaultGatherSizeCalculator"
            )
        sources = key, value
        key, value = (
            self._repeated(query.shape[self.scatter_idx], key, world),
            self._repeated(query.shape[self.scatter_idx], value, world),
        )
        heads = query.shape[self.scatter_idx]
        local = query.shape[self.gather_idx]
        length = local * world if total is None else total
        beside = {name: self._beside_sequence(t) for name, t in (("query", query), ("key", key), ("value", value))}
        check_alike(self.spg, tokens=(length,), **beside)
        inside = [all_to_all(t, self.spg, self.scatter_idx, self.gather_idx, total) for t in (query, key, value)]
        with self._lean(query, sources, inside):
            out = self.local_attn(*inside, *args, **kwargs)
        if out.shape[self.gather_idx] != length:
            raise ValueError(f"the local attention returned {out.shape[self.gather_idx]} tokens instead of {length}")
        if query.dim() == 4 and out.dim() == 3:  # a local attention that joins heads: [S, b, heads x d]
            apart = out.unflatten(-1, (inside[0].shape[self.scatter_idx], -1))
            return all_to_all(apart, self.spg, self.gather_idx, -2, heads).flatten(-2)
        features = heads if out.dim() == 4 else value.shape[self.scatter_idx]
        return all_to_all(out, self.spg, self.gather_idx, self.scatter_idx, features)

    def _lean(self, query: Tensor, sources: tuple[Tensor, Tensor], inside: list[Tensor]) -> AbstractContextManager[Any]:
        """What the policy keeps in its short form while the local attention saves tensors for backward."""
        if self.cache_policy is None:
            return nullcontext()
        world, heads = dist.get_world_size(self.spg), query.shape[self.scatter_idx]

        def exchanged(source: Tensor) -> Tensor:
            return all_to_all(self._repeated(heads, source, world), self.spg, self.scatter_idx, self.gather_idx, None)

        short = {"full": ((inside[1], sources[0]), (inside[2], sources[1])), "half": ((inside[1], sources[0]),)}
        return exchanged_again(short[self.cache_policy], exchanged)

    def _beside_sequence(self, tensor: Tensor) -> tuple[int, ...]:
        """Sizes of the dimensions that all ranks have alike."""
        return tuple(size for dim, size in enumerate(tensor.shape) if dim != self.gather_idx % tensor.dim())

    def _repeated(self, heads: int, tensor: Tensor, world: int) -> Tensor:
        """Key or value heads repeated as little as gives every rank the heads that its queries need."""
        if tensor.dim() != 4 or tensor.shape[self.scatter_idx] == heads:
            return tensor
        groups = tensor.shape[self.scatter_idx]
        if heads % groups or heads % world:
            raise ValueError(
                f"ulysses: {heads} query heads and {groups} key heads cannot be shared out over {world} ranks; with grouped "
                f"heads the number of query heads must be a multiple of both"
            )
        return tensor.repeat_interleave(math.lcm(groups, world) // groups, self.scatter_idx)
