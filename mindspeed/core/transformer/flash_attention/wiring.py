"""Where our attention meets the host: patch bodies that unpack its arguments, call a method and pack the result."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mindspeed.core.context_parallel.batches import BatchLayouts
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.packed import packed_layout, positions_in_sequences
from mindspeed.core.context_parallel.plan import RING
from mindspeed.core.context_parallel.positions import RotaryRows
from mindspeed.core.context_parallel.scope import current_layout, layout_scope, scope_is_open
from mindspeed.core.transformer.flash_attention.core_attention import CoreAttention
from mindspeed.notices import log_once
from mindspeed.patching import Patch, replace, wrap

ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
EMBEDDINGS = "megatron.core.models.common.embeddings"
Original = Callable[..., Any]


@dataclass(frozen=True)
class Wiring:
    """What one activation puts into the host.

    Attributes:
        attention: computes core attention.
        batches: makes layouts; None at context-parallel size 1 without documents or positions to restart.
        rows: cuts rotary tables.
        in_documents: attention stays inside documents.
        layer_offset: config -> layers of the model before those of the pipeline stage that is being built.
        rotate: the host's rotation of [s, b, n, d] by a table [s, 1, 1, d].
    """

    attention: CoreAttention
    batches: BatchLayouts
    rows: RotaryRows
    in_documents: bool
    layer_offset: Callable[[Any], int] = lambda config: 0
    rotate: Callable[..., Any] | None = None

    @property
    def groups(self) -> ContextGroups:
        """This rank's context-parallel groups."""
        return self.attention.groups

    def attention_patches(self) -> Iterator[Patch]:
        """Core attention itself."""
        yield wrap(f"{ATTENTION}.__init__", self._build, reason="accepts context parallelism and head sizes of its own")
        yield wrap(f"{ATTENTION}.forward", self._forward, reason="computes attention with our kernels")
        yield wrap("megatron.core.utils:get_batch_on_this_cp_rank", self._cut_batch, reason="gives each micro batch its layout")
        yield wrap(
            "megatron.core.models.gpt.gpt_model:GPTModel.forward", self._model_forward, reason="opens the layout's scope"
        )
        random = "megatron.core.tensor_parallel.random"
        yield wrap(f"{random}:checkpoint", _scoped(1), reason="recomputes under the same layout", after=("*",))
        yield wrap(
            f"{random}:CheckpointWithoutOutput.checkpoint", _scoped(2), reason="recomputes under the same layout", after=("*",)
        )

    def position_patches(self) -> Iterator[Patch]:
        """Rotary tables that follow the layout: the host caches the full table, we cut it afterwards."""
        yield replace(f"{EMBEDDINGS}.rope_utils:get_pos_emb_on_this_cp_rank", whole_table, reason="tables are cut by layout")
        rotary = f"{EMBEDDINGS}.rotary_pos_embedding"
        yield wrap(f"{rotary}:RotaryEmbedding.forward", self._rotary, reason="rows of this rank's positions")
        yield wrap(
            f"{rotary}:MultimodalRotaryEmbedding.forward", self._multimodal_rotary, reason="rows of this rank's positions"
        )
        yield wrap(
            f"{EMBEDDINGS}.yarn_rotary_pos_embedding:YarnRotaryEmbedding.forward",
            self._yarn_rotary,
            reason="rows of this rank's positions",
        )
        if self.attention.maker.plan.algorithm != RING:  # a ring holds what the host's own formula assumes
            yield wrap(
                f"{EMBEDDINGS}.rope_utils:_apply_rotary_pos_emb_thd",
                self._packed_rotary,
                reason="positions of packed sequences follow the layout",
                after=("*",),
            )

    def document_patches(self, pipeline_size: int, stage_reads: Callable[[], bool]) -> Iterator[Patch]:
        """Documents of each micro batch, on every stage."""
        yield wrap("training:get_batch_on_this_tp_rank", self._read_batch, reason="finds where documents end")
        if pipeline_size > 1:
            builder = "megatron.core.datasets.blended_megatron_dataset_builder:BlendedMegatronDatasetBuilder"
            yield wrap(f"{builder}.__init__", _build_on_every_stage(stage_reads), reason="every stage learns documents")
            schedule = "megatron.core.pipeline_parallel.schedules:forward_step"
            yield wrap(schedule, self._forward_step, reason="shows the model which samples it computes", after=("*",))

    def _forward(
        self,
        original: Original,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> Any:
        if attention_bias is not None:
            raise ValueError("core attention: attention_bias is not supported; use ALiBi or set_attention_mask")
        if query.shape[0] != key.shape[0] and self.attention.maker.plan.size == 1 and packed_seq_params is None:
            log_once(
                "flash attention leaves calls with unequal numbers of queries and keys (inference, cross attention) to the host"
            )
            return original(module, query, key, value, attention_mask, attn_mask_type)
        return self.attention(module, query, key, value, attention_mask, attn_mask_type, packed_seq_params)

    def _build(self, original: Original, module: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        build_attention(original, module, config, *args, **kwargs)
        self.attention.check_type(module.attn_mask_type.name, module.attention_type)
        module.global_layer_number = module.layer_number + self.layer_offset(config)

    def _packed_rotary(
        self,
        original: Original,
        t: Any,
        cu_seqlens: Any,
        freqs: Any,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Any:
        plan = self.attention.maker.plan
        if plan.size == 1 or self.rotate is None:
            return original(t, cu_seqlens, freqs, rotary_interleaved, multi_latent_attention, mscale)
        places = cu_seqlens.tolist()
        layout = packed_layout(self.attention.maker, t.shape[0] * plan.size, places)
        positions = positions_in_sequences(layout, self.groups.rank, places).to(freqs.device)
        options = {"rotary_interleaved": rotary_interleaved, "multi_latent_attention": multi_latent_attention, "mscale": mscale}
        return self.rotate(t.unsqueeze(1), freqs.index_select(0, positions), **options).squeeze(1)

    def _cut_batch(self, original: Original, batch: Any) -> Any:
        return self.batches.cut(batch)

    def _read_batch(self, original: Original, data_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(data_iterator, *args, **kwargs)
        self.batches.note_documents(batch)
        return batch

    def _model_forward(self, original: Original, model: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("inference_context", args[5] if len(args) > 5 else None) or kwargs.get("inference_params")
        if cache is not None and self.attention.maker.plan.size > 1:
            raise ValueError(
                "context parallelism: inference with a key-value cache is not shared out; use --context-parallel-size 1"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        with self.batches.around_model(self._length_seen_by(model, ids), reads=model.pre_process, tokens=ids):
            return original(model, *args, **kwargs)

    def _length_seen_by(self, model: Any, input_ids: Any) -> int | None:
        """S of what a stage gets: tokens [b, s] on the first one, hidden states [s, b, h] on the others."""
        if model.pre_process:
            return None if input_ids is None else int(input_ids.shape[1]) * self.attention.maker.plan.size
        received = getattr(getattr(model, "decoder", None), "input_tensor", None)
        if received is None:
            return None
        shards = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
        return int(received.shape[0]) * shards * self.attention.maker.plan.size

    def _forward_step(self, original: Original, forward_step_func: Any, data_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        with self.batches.reading_from(data_iterator):
            return original(forward_step_func, data_iterator, *args, **kwargs)

    def _rotary(self, original: Original, module: Any, max_seq_len: int, offset: int = 0, packed_seq: bool = False) -> Any:
        table = original(module, max_seq_len, offset, packed_seq)
        return table if packed_seq else self.rows.rows(table)

    def _multimodal_rotary(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        return self.rows.rows(original(*args, **kwargs))

    def _yarn_rotary(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        table, scale = original(*args, **kwargs)
        return self.rows.rows(table), scale


def whole_table(pos_emb: Any, seq_dim: int) -> Any:
    """The table as it is; rows are chosen where the layout is known."""
    return pos_emb


def build_attention(
    original: Original,
    module: Any,
    config: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Construct the host's core attention under context parallelism, which it refuses by itself."""
    neutral = copy.copy(config)
    neutral.context_parallel_size = 1
    original(module, neutral, *args, **kwargs)
    module.config = config


def _scoped(position: int) -> Callable[..., Any]:
    """Advice that runs the function at this place of a checkpoint call under the layout of the call."""

    def checkpoint(original: Original, *args: Any, **kwargs: Any) -> Any:
        layout = current_layout()
        if not scope_is_open():
            return original(*args, **kwargs)
        place = position - 1
        function = args[place]

        @functools.wraps(function)
        def under_layout(*inner: Any, **named: Any) -> Any:
            with layout_scope(layout):
                return function(*inner, **named)

        return original(*args[:place], under_layout, *args[place + 1 :], **kwargs)

    return checkpoint


def _build_on_every_stage(stage_reads: Callable[[], bool]) -> Callable[..., None]:
    def init(original: Original, builder: Any, cls: Any, sizes: Any, is_built_on_rank: Any, config: Any) -> None:
        original(builder, cls, sizes, lambda: is_built_on_rank() or stage_reads(), config)

    return init
