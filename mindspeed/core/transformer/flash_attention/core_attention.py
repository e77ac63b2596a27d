"""The host's core attention, carried out by our kernels: what is visible, at which scale, with which dropout.

Which mask applies, first match wins: one set with `set_attention_mask`, a tensor passed to the call, the layer's own
type together with documents and band. What the layer declares is never overruled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mindspeed.core.attention import Dropout
from mindspeed.core.context_parallel.context_attention import context_attention
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.packed import packed_layout
from mindspeed.core.context_parallel.plan import RING
from mindspeed.core.context_parallel.scope import current_layout, scope_is_open
from mindspeed.core.context_parallel.work import AttentionOptions
from mindspeed.errors import ConfigError, Problem

CAUSAL_TYPES = ("causal", "padding_causal")


@dataclass(frozen=True)
class CoreAttention:
    """Everything that a run decides about core attention once.

    Attributes:
        maker, groups: how sequences are shared out, and the band.
        slopes_of: number of heads over all tensor-parallel ranks -> ALiBi slopes of this rank, or None without ALiBi.
        distance: what ALiBi slopes multiply, see `AlibiBias`.
        rng_fork: scope in which attention dropout draws, from the host's tracker.
        mask_required: a layer without a custom mask is an error (`--sparse-mode 1`).
        in_documents: attention stays inside the documents of the batch, which the scope of a layout tells.
    """

    maker: LayoutMaker
    groups: ContextGroups
    slopes_of: Callable[[int, torch.device], Tensor] | None = None
    distance: str = "absolute"
    rng_fork: Callable[[], AbstractContextManager[Any]] | None = None
    mask_required: bool = False
    in_documents: bool = False

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        packed: Any = None,
    ) -> Tensor:
        """Attention of one layer of the host.

        Args:
            module: the host's core attention: config, layer number, scale, mask type, dropout.
            query: [s, b, n, d] (packed: [t, n, d]); key, value likewise with their heads.
            attention_mask: bool, True where hidden, over the whole sequence; or None.
            packed: the host's parameters of packed sequences, or None.

        Returns:
            [s, b, n dv] (packed: [t, n dv]).
        """
        if packed is not None:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        layout = self._layout(module, query, key, attention_mask, attn_mask_type, packed)
        out = context_attention(
            query,
            key,
            value,
            plan=self.maker.plan,
            groups=self.groups,
            layout=layout,
            options=self._options(module, query),
            layer_number=getattr(module, "global_layer_number", module.layer_number),
        )
        out = out.flatten(2)
        return out.squeeze(1) if packed is not None else out

    def _layout(
        self, module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, attn_mask_type: Any, packed: Any
    ) -> SequenceLayout:
        """The micro batch's layout with this layer's mask."""
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"core attention: {query.shape[0]} queries and {key.shape[0]} keys; cross attention is not supported"
            )
        if self.in_documents and packed is None and attention_mask is None and not scope_is_open():
            raise ValueError(
                "--reset-attention-mask: documents are known while the GPT model runs, and where megatron-core's own "
                "tensor_parallel.checkpoint recomputes it; this layer was called outside. Recompute with that instead of "
                "torch.utils.checkpoint"
            )
        length = query.shape[0] * self.maker.plan.size
        layout = self._packed_layout(length, packed) if packed is not None else current_layout()
        if layout is None or layout.length != length:
            layout = self.maker.layout(length)
        name = (attn_mask_type if attn_mask_type is not None else module.attn_mask_type).name
        if packed is None:  # packed sequences of any type keep to a placement of their own
            self.check_type(name)
        if layout.planned_by_rule:
            self._check_planned(name, attention_mask)
        if layout.custom_mask is not None or layout.tile_masks is not None:
            if layout.custom_mask is not None:
                _check_mask("set_attention_mask", layout.custom_mask, length, query.shape[1])
            return layout
        if attention_mask is not None:
            _check_mask("attention_mask", attention_mask, length, query.shape[1])
            if self.maker.plan.size > 1 and self.maker.plan.mask_type == "causal":
                raise ValueError("attention_mask: a mask that is passed to a layer needs --attention-mask-type general")
            return replace(layout, custom_mask=attention_mask)
        self._check_required()
        past, future = self.maker.band.limits(name in CAUSAL_TYPES)
        return replace(layout, past=past, future=future)

    def _check_planned(self, name: str, attention_mask: Tensor | None) -> None:
        """Whether a plan for causal layers is what this layer wants.

        Raises:
            ValueError: the layer sees more, or other things, than the plan was made for.
        """
        algorithm = self.maker.plan.algorithm
        if name not in CAUSAL_TYPES:
            raise ValueError(
                f"--context-parallel-algo {algorithm} needs a mask with structure; a layer of type {name} without one sees "
                "everything: use another algorithm"
            )
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask: --context-parallel-algo {algorithm} shares tokens out by the mask before a layer is called; "
                "give it to set_attention_mask"
            )
        self._check_required()

    def _check_required(self) -> None:
        if self.mask_required:
            raise ValueError("--sparse-mode 1 needs a mask: call set_attention_mask before the step, or use --sparse-mode 0")

    def check_type(self, name: str, attention: str = "self") -> None:
        """Whether layers of this mask type can be shared out as the run says; asked when a layer is built, and at each call.

        Raises:
            ConfigError: cross attention, or a layer that sees the future beside the sharding of causal ones.
        """
        plan = self.maker.plan
        if plan.size > 1 and attention != "self":
            rule = f"a layer of {attention} attention has other keys than queries, which context parallelism does not share out"
            raise ConfigError([Problem("--context-parallel-size", plan.size, rule, "use size 1 for this model")])
        if plan.size > 1 and plan.mask_type == "causal" and name not in CAUSAL_TYPES:
            rule = f"a layer of type {name} sees the future, and the sharding is that of causal layers"
            fix = "use --attention-mask-type general"
            raise ConfigError([Problem("--attention-mask-type", "causal", rule, fix)])

    def _packed_layout(self, length: int, packed: Any) -> SequenceLayout:
        """Layout of a packed batch, checked against what its parameters say.

        Raises:
            ValueError: another format, lengths that do not fit, or a mask beside the documents.
        """
        if packed.qkv_format != "thd":
            raise ValueError(f"packed_seq_params: expected qkv_format thd, got {packed.qkv_format}")
        if self.maker.has_mask():
            raise ValueError("packed_seq_params: a mask is set with set_attention_mask too; use one of the two")
        if self.maker.adaptive is not None:
            rule = f"--context-parallel-algo {self.maker.plan.algorithm} does not keep sequences apart; use {RING}"
            raise ValueError(f"packed_seq_params: {rule}")
        for suffix in ("", "_padded"):
            queries, keys = (getattr(packed, f"cu_seqlens_{side}{suffix}", None) for side in ("q", "kv"))
            if queries is not None and keys is not None and queries.tolist() != keys.tolist():
                rule = f"cu_seqlens_q{suffix} and cu_seqlens_kv{suffix} differ; cross attention is not supported"
                raise ValueError(f"packed_seq_params: {rule}")
        ends = packed.cu_seqlens_q.tolist()
        padded = getattr(packed, "cu_seqlens_q_padded", None)
        return packed_layout(self.maker, length, ends, None if padded is None else padded.tolist())

    def _options(self, module: Any, query: Tensor) -> AttentionOptions:
        """Scale, dropout and slopes of this call."""
        config = module.config
        scale = module.softmax_scale
        if config.apply_query_key_layer_scaling:
            scale *= module.layer_number  # the host divides, and multiplies back inside its softmax
        slopes = None
        if self.slopes_of is not None:
            slopes = self.slopes_of(config.num_attention_heads, query.device)
        return AttentionOptions(float(scale), self._dropout(module), slopes, self.distance)

    def _dropout(self, module: Any) -> Dropout | None:
        """A fresh seed from the host's random state; only in training."""
        probability = module.attention_dropout.p
        if not module.training or probability == 0.0:
            return None
        if module.config.sequence_parallel or self.rng_fork is None:
            return Dropout(probability, _draw_seed())
        with self.rng_fork():
            return Dropout(probability, _draw_seed())


def _draw_seed() -> int:
    """63 bits from the device's default generator, so that trackers and recomputation govern it."""
    from mindspeed.platform import current

    return int(torch.randint(0, 2**62, (), device=current().device()).item())


def _check_mask(name: str, mask: Tensor, length: int, batch: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (True = hidden), got {mask.dtype}")
    if mask.shape[-2:] != (length, length) or (mask.dim() == 4 and mask.shape[0] not in (1, batch)):
        raise ValueError(
            f"{name}: expected [{length}, {length}] or [1 or {batch}, 1, {length}, {length}] (the whole sequence), "
            f"got {tuple(mask.shape)}"
        )
