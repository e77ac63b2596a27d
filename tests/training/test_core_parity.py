"""The trainer against megatron-core driven by hand: the same weights, bit for bit."""

from __future__ import annotations

import hashlib

import torch

from tests.training.runs import TINY, train

STEPS = 10


def samples_by_hand():
    """The host's mock documents, one sample a batch."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset

    from mindspeed.training.tokenizers import NullTokenizer

    data = GPTDatasetConfig(
        random_seed=1234, sequence_length=32, blend=None, blend_per_split=None, split=None, path_to_cache=None, mmap_bin_files=True,
        tokenizer=NullTokenizer(8191), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    dataset, *_ = BlendedMegatronDatasetBuilder(MockGPTDataset, [STEPS * 4, 0, 0], lambda: True, data).build()
    return iter(torch.utils.data.DataLoader(dataset, batch_size=1))


def digest_of(model) -> str:
    """One number for all names and bits of the weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def by_hand() -> tuple[list[float], str]:
    """What the documentation of megatron-core shows, in forty lines; needs its groups and torch's platform ready."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(
        num_layers=4, hidden_size=128, num_attention_heads=4, attention_dropout=0.1, hidden_dropout=0.1, masked_softmax_fusion=True,
        bias_activation_fusion=True, bias_dropout_fusion=True, apply_rope_fusion=False, gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True, pipeline_dtype=torch.float32, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    gpt = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=8192, max_sequence_length=32, share_embeddings_and_output_weights=True
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(check_for_nan_in_grad=True), gpt)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=2e-4, clip_grad=1.0, weight_decay=0.01), [model])
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=2e-4, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=40, lr_decay_style="constant",
        start_wd=0.01, end_wd=0.01, wd_incr_steps=40, wd_incr_style="constant",
    )  # fmt: skip
    config.grad_scale_func = optimizer.scale_loss
    samples = samples_by_hand()

    def forward(iterator, chunk):
        batch = next(iterator)
        output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])

        def loss(losses):
            total = (losses.float().view(-1) * batch["loss_mask"].view(-1)).sum()
            count = batch["loss_mask"].sum()
            return total.clone(), count.to(torch.int), {"lm loss": (total.detach(), count)}

        return output, loss

    curve = []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=samples, model=[model], num_microbatches=4, seq_length=32, micro_batch_size=1,
            forward_only=False,
        )  # fmt: skip
        optimizer.step()
        schedule.step(increment=4)
        curve.append(float(sum(r["lm loss"][0] for r in reports) / sum(r["lm loss"][1] for r in reports)))
    assert parallel_state.is_initialized()
    return curve, digest_of(model)


def test_ten_steps_are_bitwise_those_of_megatron_core(tmp_path):
    flags = TINY.replace("--attention-dropout 0 --hidden-dropout 0", "--attention-dropout 0.1 --hidden-dropout 0.1")
    flags = flags.replace("--train-iters 3", f"--train-iters {STEPS}").replace(
        "--lr-decay-style cosine", "--lr-decay-style constant"
    )
    ours = train(f"{flags} --no-gradient-accumulation-fusion --optimization-level 0 --data-cache-path {tmp_path}")

    from mindspeed.training import initialize

    try:  # the same ground: platform, repairs and groups, but none of the trainer's loop
        initialize.initialize(argv=f"{flags} --no-gradient-accumulation-fusion --optimization-level 0".split())
        curve, digest = by_hand()
    finally:
        initialize.shut_down()
    assert [f"{loss:.6E}" for loss in curve] == [loss for _, loss, _ in ours.curve]
    assert digest == ours.digest
