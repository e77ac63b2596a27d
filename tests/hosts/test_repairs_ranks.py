"""Level-0 repairs of megatron-core that need several ranks."""

import pytest
import torch

from mindspeed.testing import ranks
from tests.hosts.level0_scope import level0_active


def model_parallel(tensor=1, **sizes):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor, **sizes)
    model_parallel_cuda_manual_seed(7)


@ranks(2, megatron=True)
def test_non_contiguous_tensors_are_reduced(world):
    with level0_active() as ledger:
        from megatron.core.tensor_parallel import mappings

        model_parallel(2)
        transposed = torch.ones(2, 3).t()
        torch.testing.assert_close(mappings.reduce_from_tensor_model_parallel_region(transposed), torch.full((3, 2), 2.0))
        x = torch.ones(4, requires_grad=True)
        mappings.copy_to_tensor_model_parallel_region(x).sum().backward()  # the gradient of a sum is expanded
        torch.testing.assert_close(x.grad, torch.full((4,), 2.0))
        assert ledger.calls("megatron.core.tensor_parallel.mappings:_reduce") == 2


@ranks(2, megatron=True)
def test_gather_and_scatter_of_different_sizes(world):
    with level0_active():
        from megatron.core.tensor_parallel import mappings

        model_parallel(2)
        sizes = [1, 3]
        mine = torch.full((sizes[world.rank], 2), float(world.rank))
        gathered = mappings._gather_along_first_dim(mine, output_split_sizes=sizes)
        assert gathered[:, 0].tolist() == [0.0, 1.0, 1.0, 1.0]
        scattered = mappings._reduce_scatter_along_first_dim(gathered.t().contiguous().t(), input_split_sizes=sizes)
        torch.testing.assert_close(scattered, 2 * mine)
        nothing = mappings._gather_along_first_dim(mine[: world.rank], output_split_sizes=[0, 1])
        assert nothing[:, 0].tolist() == [1.0]


def small_gpt(**changes):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    normalization = changes.pop("normalization", "LayerNorm")
    qk = changes.pop("qk_layernorm", False)
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": normalization,
        "qk_layernorm": qk,
        "gradient_accumulation_fusion": True,
    }
    config = TransformerConfig(**{**values, **changes})
    spec = get_gpt_layer_local_spec(qk_layernorm=qk, normalization=normalization)
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=16)


class Training:
    """Steps on fixed tokens, which are the same for all ranks with the same seed."""

    def __init__(self, model, *, distributed_optimizer=False, seed=0):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True)
        self.ddp = DistributedDataParallel(model.config, ddp_config, model)
        config = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=distributed_optimizer)
        self.optimizer = get_megatron_optimizer(config, [self.ddp])
        self.tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed))

    def steps(self, count):
        from megatron.core.distributed import finalize_model_grads

        losses = []
        for _ in range(count):
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            positions = torch.arange(16).expand(2, 16)
            loss = self.ddp(self.tokens[:, :-1], positions, None, labels=self.tokens[:, 1:]).mean()
            loss.backward()
            finalize_model_grads([self.ddp])
            ok, _, zeros = self.optimizer.step()
            assert ok and zeros is None, "nobody asked for the number of zeros"
            losses.append(float(loss.detach()))
        return losses


@ranks(2, megatron=True)
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_norm_weights_stay_equal_on_all_ranks_of_sequence_parallelism(world, normalization, qk_layernorm):
    with level0_active():
        model_parallel(2)
        model = small_gpt(
            normalization=normalization, qk_layernorm=qk_layernorm, tensor_model_parallel_size=2, sequence_parallel=True
        )
        losses = Training(model).steps(6)
        assert losses[-1] < losses[0]
        norms = [p for name, p in model.named_parameters() if "norm" in name and "weight" in name]
        assert len(norms) == 5 + 4 * qk_layernorm
        for norm in norms:
            assert not torch.equal(norm.data, torch.ones_like(norm)), "it was trained"
            both = world.gather(norm.data).chunk(2)
            assert torch.equal(both[0], both[1])


@ranks(2, megatron=True)
def test_unmarked_norms_drift_apart(world):
    """Why the mark matters: without it the same training leaves different weights on the ranks."""
    with level0_active():
        model_parallel(2)
        model = small_gpt(tensor_model_parallel_size=2, sequence_parallel=True)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.sequence_parallel = False
        Training(model).steps(6)
        both = world.gather(model.decoder.final_layernorm.weight.data).chunk(2)
        assert not torch.equal(both[0], both[1])


@ranks(2, megatron=True)
def test_distributed_optimizer_resumes_from_its_own_torch_format(world):
    with level0_active() as ledger:
        model_parallel(1)
        torch.manual_seed(0)
        run = Training(small_gpt(), distributed_optimizer=True, seed=world.rank)
        run.steps(3)
        weights = {name: value.clone() for name, value in run.ddp.state_dict().items() if torch.is_tensor(value)}
        state, path = run.optimizer.state_dict(), str(world.shared_dir / "optimizer.pt")
        assert state["optimizer"]["param_groups"][0]["step"] == 3
        run.optimizer.save_parameter_state(path)
        undisturbed = run.steps(3)
        with torch.no_grad():
            for name, value in run.ddp.state_dict().items():
                if torch.is_tensor(value):
                    value.copy_(weights[name])
        run.optimizer.load_state_dict(state)
        run.optimizer.load_parameter_state(path)
        assert run.steps(3) == undisturbed
        target = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states"
        assert ledger.calls(target) > 0
        assert ledger.calls("megatron.core.fp8_utils:_quantize_param_shard_impl") > 0


@ranks(2, megatron=True)
@pytest.mark.parametrize("hidden", [40, 64])
def test_shared_embedding_bucket_starts_where_the_one_before_it_ends(world, hidden):
    """Sizes that are no multiple of 128: the host starts the embedding's bucket before its own range."""
    with level0_active() as ledger:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        model_parallel(1)
        model = small_gpt(hidden_size=hidden, num_attention_heads=2, ffn_hidden_size=2 * hidden)
        model.embedding.word_embeddings.weight.shared_embedding = True
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
        for buffer in ddp.buffers:
            for parameter, (start, end, bucket) in buffer.param_index_map.items():
                first, last = buffer.bucket_indices[bucket]
                assert first <= start and end <= last and first % 128 == 0, parameter.shape
            assert buffer.data_parallel_world_size == 2
        assert ledger.calls("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__") > 0


@ranks(2, megatron=True)
def test_projection_of_attention_is_registered_last(world):
    with level0_active():
        model_parallel(1)
        attention = small_gpt(qk_layernorm=True).decoder.layers[0].self_attention
        names = [name for name, _ in attention.named_children()]
        assert names[-1] == "linear_proj" and names.index("linear_qkv") < names.index("linear_proj")
