"""Which algorithm shares a sequence out, with which degrees, and what that means for where tokens live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.context_parallel.layout import Boundaries, SequenceLayout

RING = "megatron_cp_algo"
ULYSSES = "ulysses_cp_algo"
HYBRID = "hybrid_cp_algo"
ADAPTIVE = "adaptive_cp_algo"
HYBRID_ADAPTIVE = "hybrid_adaptive_cp_algo"
GATHER = "kvallgather_cp_algo"
ALGORITHMS = (RING, HYBRID, HYBRID_ADAPTIVE, ULYSSES, ADAPTIVE, GATHER)
WITH_RING = (RING, HYBRID)
WITH_DEGREE = (HYBRID, HYBRID_ADAPTIVE)
MANY_TOKENS = 64  # a chunk of a document shorter than this keeps no kernel busy


@dataclass(frozen=True)
class ContextPlan:
    """The context-parallel part of a run, fixed after validation.

    Attributes:
        algorithm: one of `ALGORITHMS`.
        size: context-parallel size.
        degree: Ulysses degree of the hybrid algorithms.
        window: ranks per window of a double ring.
        mask_type: "causal" balances the causal triangle, "general" cuts into plain blocks.
        cache: None, "full" or "half"; what it saves depends on the algorithm.
        cache_interval: layers between those that use the cache policy.
        allgather_kv: Ulysses gathers keys and values along the sequence instead of exchanging heads.
        fused_update: rings merge partial results with one kernel of the device.
        memory_order: arrangement of a ring's tensors in kernels that read several, see `Scoring`.
        gradient_dtype: of the gradients of keys and values that rings send; None is fp32 (fp64 for fp64).
    """

    algorithm: str = RING
    size: int = 1
    degree: int | None = None
    window: int = 1
    mask_type: str = "causal"
    cache: str | None = None
    cache_interval: int = 0
    allgather_kv: bool = False
    fused_update: bool = False
    memory_order: str = "SBH"
    gradient_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ContextPlan:
        """Plan of a run from its arguments by destination name."""
        return cls(
            algorithm=values.get("context_parallel_algo") or RING,
            size=values.get("context_parallel_size") or 1,
            degree=values.get("ulysses_degree_in_cp"),
            window=values.get("cp_window_size") or 1,
            mask_type=values.get("attention_mask_type") or "causal",
            cache=values.get("context_parallel_kv_cache_policy"),
            cache_interval=values.get("context_parallel_cache_interval") or 0,
            allgather_kv=bool(values.get("use_ulysses_allgather_kv")),
            fused_update=bool(values.get("use_fused_ring_attention_update")),
            memory_order="BNSD" if values.get("megatron_cp_in_bnsd") else "SBH",
            gradient_dtype=torch.bfloat16 if values.get("cp_kv_gradient_dtype") == "bf16" else None,
        )

    @property
    def ulysses(self) -> int:
        """Ranks that share heads."""
        if self.algorithm == ULYSSES:
            return self.size
        return (self.degree or 1) if self.algorithm in WITH_DEGREE else 1

    @property
    def ring(self) -> int:
        """Ranks that share a sequence inside attention."""
        return self.size // self.ulysses

    @property
    def holds_zigzag(self) -> bool:
        """Whether ranks hold what the host's own slicing gives them, when documents do not matter."""
        return self.algorithm in (RING, GATHER) and self.mask_type == "causal"

    def layout(
        self,
        length: int,
        *,
        boundaries: Boundaries | None = None,
        restart_positions: bool = False,
        custom_mask: Tensor | None = None,
        past: int | None = None,
        future: int | None = 0,
    ) -> SequenceLayout:
        """Where `length` tokens live; every rank comes to the same answer.

        Args:
            boundaries: documents of each sample, when attention stays inside them.
            restart_positions, custom_mask, past, future: see `SequenceLayout`.
        """
        return SequenceLayout(
            length,
            ring=self.ring,
            ulysses=self.ulysses,
            placement=self._placement(boundaries),
            past=past,
            future=future,
            boundaries=boundaries,
            restart_positions=restart_positions,
            custom_mask=custom_mask,
        )

    def _placement(self, boundaries: Boundaries | None) -> str:
        if self.algorithm == GATHER:
            return "zigzag" if self.mask_type == "causal" and boundaries is None else "contiguous"
        if self.algorithm not in WITH_RING:
            return "contiguous"
        if boundaries is None:
            return "zigzag" if self.mask_type == "causal" else "contiguous"
        if self.mask_type == "general":
            return "zigzag"
        return "document_zigzag" if self._documents_are_long(boundaries) else "zigzag"

    def _documents_are_long(self, boundaries: Boundaries) -> bool:
        """Whether chunks of the mean document keep a kernel busy; short documents are better left whole."""
        documents = sum(len(sample) - 1 for sample in boundaries)
        tokens = sum(sample[-1] for sample in boundaries)
        return tokens >= documents * 2 * self.ring * MANY_TOKENS

    def caches(self, layer_number: int) -> bool:
        """Whether the cache policy is used in a layer (1-based, over the whole model)."""
        return self.cache is not None and (layer_number - 1) % (self.cache_interval + 1) == 0
