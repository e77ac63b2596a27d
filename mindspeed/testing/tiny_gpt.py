"""A GPT trained by megatron-core calls written out by hand, without any trainer: the yardstick of the built-in one.

Fixed weights (`whole_weights.fill`), fixed data (`TinyTokens`), one process group layout per call. Call it inside
`mindspeed.enable(...)`, on ranks whose default process group exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel  # noqa: TID251 - this loop is what the host's users write
from megatron.core.distributed import (  # noqa: TID251
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: TID251
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: TID251
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: TID251
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: TID251
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: TID251
from megatron.core.transformer import TransformerConfig  # noqa: TID251

from mindspeed.testing.tiny_data import TinyTokens
from mindspeed.testing.whole_weights import fill

# where Megatron-LM's command line has other defaults than megatron-core's config
_LIKE_MEGATRON_LM: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_softmax_in_fp32": False,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "gradient_accumulation_fusion": True,
    "persist_layer_norm": True,
    "deallocate_pipeline_outputs": True,
}


@dataclass(frozen=True, kw_only=True)
class TinyGpt:
    """Sizes of model, data and layout; the defaults are those of the parity harness."""

    num_layers: int = 4
    hidden_size: int = 64
    num_attention_heads: int = 4
    seq_length: int = 32
    vocabulary: int = 4224
    micro_batch_size: int = 1
    global_batch_size: int = 4
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    lr: float = 1e-3
    adam_eps: float = 1e-4
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # further fields of TransformerConfig
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of GPTModel


class TinyTraining:
    """Model, optimizer and data of a `TinyGpt`; `step()` trains one global batch.

    Attributes:
        losses, grad_norms: one entry for each step (losses on the last pipeline stage only).
    """

    def __init__(self, sizes: TinyGpt) -> None:
        self.sizes = sizes
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        parallel_state.initialize_model_parallel(sizes.tensor_parallel, sizes.pipeline_parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        config = self._config()
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=sizes.vocabulary,
            max_sequence_length=sizes.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=True,
            **sizes.model,
        )
        fill(chunk)
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        ddp = DistributedDataParallelConfig(check_for_nan_in_grad=True)
        self.model = DistributedDataParallel(config, ddp, chunk)
        settings = OptimizerConfig(
            optimizer="adam", lr=sizes.lr, min_lr=0.0, weight_decay=0.01, adam_eps=sizes.adam_eps, clip_grad=1.0
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.scheduler = _constant_schedule(self.optimizer, sizes.lr, settings.weight_decay)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self._batches = self._read()

    def _config(self) -> TransformerConfig:
        sizes = self.sizes
        return TransformerConfig(
            num_layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            num_attention_heads=sizes.num_attention_heads,
            tensor_model_parallel_size=sizes.tensor_parallel,
            pipeline_model_parallel_size=sizes.pipeline_parallel,
            pipeline_dtype=torch.float32,
            **(_LIKE_MEGATRON_LM | sizes.config),
        )

    def _read(self) -> Iterator[dict[str, torch.Tensor]]:
        """Micro batches of this data-parallel rank."""
        sizes, ranks = self.sizes, parallel_state.get_data_parallel_world_size()
        data = TinyTokens(1 << 20, sizes.seq_length, sizes.vocabulary - 1)
        place = parallel_state.get_data_parallel_rank()
        for start in range(0, len(data), sizes.micro_batch_size * ranks):
            indices = range(start + place * sizes.micro_batch_size, start + (place + 1) * sizes.micro_batch_size)
            samples = [data[index] for index in indices]
            yield {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def step(self) -> None:
        """Forward and backward over all micro batches, then the optimizer."""
        sizes = self.sizes
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = sizes.micro_batch_size * parallel_state.get_data_parallel_world_size()
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=self._batches,
            model=[self.model],
            num_microbatches=sizes.global_batch_size // share,
            seq_length=sizes.seq_length,
            micro_batch_size=sizes.micro_batch_size,
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=sizes.global_batch_size)
        self.grad_norms.append(float(grad_norm))
        if parallel_state.is_pipeline_last_stage():
            self.losses.append((sum(r[0] for r in reports) / sum(r[1] for r in reports)).item())


def _constant_schedule(optimizer: Any, lr: float, weight_decay: float) -> OptimizerParamScheduler:
    """The same learning rate for all steps; also what keeps weight decay away from biases and norms."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=1 << 30,
        lr_decay_style="constant",
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=1 << 30,
        wd_incr_style="constant",
    )


def _forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        mask = batch["loss_mask"].view(-1)
        total = torch.stack([(losses.float().view(-1) * mask).sum(), mask.sum()])
        reported = total.detach().clone()
        torch.distributed.all_reduce(reported, group=parallel_state.get_data_parallel_group())
        return total[0].clone(), total[1].detach().to(torch.int), (reported[0], reported[1])

    return output, loss
