"""Level-0 repairs of megatron-core that one process can show."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from mindspeed.host import level0
from mindspeed.host.repairs import adam, buckets, checkpoint_io, collectives, fused_kernels, jit, moe, numpy_names
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.plan import Plan
from tests.hosts.level0_scope import level0_active

CPU = SimpleNamespace(name="cpu")
CUDA = SimpleNamespace(name="cuda")


@pytest.fixture
def repaired():
    with level0_active() as ledger:
        yield ledger


# --- the whole of level 0 ---


def test_every_repair_applies_is_owned_and_leaves_nothing_behind():
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import layers, mappings

    before = [dict(vars(module)) for module in (distrib_optimizer, layers, mappings)]
    with level0_active() as ledger:
        owners = {row.owner for row in ledger.rows}
        assert set(level0.REPAIRS) <= owners | {"repair.jit"}
        assert all(row.reason for row in ledger.rows if row.owner in level0.REPAIRS)
        count = len(ledger)
        level0.activate(ledger)
        assert len(ledger) == count, "a second activation must change nothing"
    for module, names in zip((distrib_optimizer, layers, mappings), before, strict=True):
        assert vars(module).keys() == names.keys()
        assert all(vars(module)[name] is value for name, value in names.items())


def test_cuda_keeps_the_compiled_functions_and_the_type_names():
    ledger = Ledger()
    Plan.of(level0.level0_patches(CUDA)).apply(ledger)
    try:
        owners = {row.owner for row in ledger.rows}
        assert not owners & {"repair.jit", "repair.type-strings"}
        assert {"repair.buckets", "repair.norms", "repair.collectives", "compat.torch"} <= owners
    finally:
        ledger.revert()


# --- jit ---


def test_functions_compiled_before_are_unwrapped_under_all_their_names_and_given_back():
    from megatron.core.fusions import fused_bias_gelu

    plain = fused_bias_gelu.bias_gelu

    def compiled(*args):
        raise AssertionError("must not run")

    compiled._torchdynamo_orig_callable = plain
    fused_bias_gelu.bias_gelu = compiled
    fused_bias_gelu.alias_of_bias_gelu = compiled
    try:
        with Plan.of(level0.level0_patches(CPU)).applied():
            assert fused_bias_gelu.bias_gelu is not compiled and fused_bias_gelu.alias_of_bias_gelu is not compiled
            x = torch.randn(2, 4)
            torch.testing.assert_close(fused_bias_gelu.bias_gelu(torch.zeros(4), x), plain(torch.zeros(4), x))
        assert fused_bias_gelu.bias_gelu is compiled and fused_bias_gelu.alias_of_bias_gelu is compiled
    finally:
        fused_bias_gelu.bias_gelu = plain
        del fused_bias_gelu.alias_of_bias_gelu


def test_compile_is_switched_off_for_the_host_alone():
    compile_ = torch.compile
    with jit.not_compiling(CPU):
        host = {"__name__": "megatron.core.made_up", "torch": torch, "f": abs}
        exec("g = torch.compile(f)", host)
        assert host["g"] is abs
        assert torch.compile(lambda x: x) is not None and hasattr(torch.compile(lambda x: x), "_torchdynamo_orig_callable")
    assert torch.compile is compile_
    with jit.not_compiling(CUDA):
        assert torch.compile is compile_


def test_jit_fuser_is_the_identity_for_modules_imported_later(repaired):
    from megatron.core.jit import jit_fuser

    assert jit_fuser(len) is len


# --- Transformer Engine is absent ---


def test_version_question_is_answered_and_empty_quantisation_passes(repaired):
    from megatron.core.fp8_utils import quantize_param_shard
    from megatron.core.utils import get_te_version, is_te_min_version

    assert str(get_te_version()) == "0.0" and not is_te_min_version("1.0")
    assert quantize_param_shard([], [], [], None) is None
    with pytest.raises(RuntimeError, match="Transformer Engine"):
        quantize_param_shard([torch.zeros(1)], [torch.zeros(1)], [0], None)
    assert repaired.calls("megatron.core.fp8_utils:_quantize_param_shard_impl") == 2


def test_without_the_repair_even_an_empty_list_stops():
    from megatron.core.fp8_utils import quantize_param_shard

    with pytest.raises(RuntimeError, match="Transformer Engine"):
        quantize_param_shard([], [], [], None)


# --- norms ---


def config(**changes):
    values = {
        "normalization": "RMSNorm",
        "sequence_parallel": True,
        "layernorm_zero_centered_gamma": False,
        "persist_layer_norm": True,
        "memory_efficient_layer_norm": True,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_are_torch_s_with_their_parameters_marked(repaired, kind, sequence_parallel):
    norm = WrappedTorchNorm(config(normalization=kind, sequence_parallel=sequence_parallel), 8, eps=1e-6)
    assert type(norm) is getattr(torch.nn, kind) and norm.eps == 1e-6
    assert {name for name, _ in norm.named_parameters()} == ({"weight", "bias"} if kind == "LayerNorm" else {"weight"})
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_zero_centred_weight_counts_one_more(repaired, kind):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    ours = WrappedTorchNorm(config(normalization=kind, layernorm_zero_centered_gamma=True), 8)
    plain = WrappedTorchNorm(config(normalization=kind), 8)
    torch.testing.assert_close(ours(x), plain(x))
    with torch.no_grad():
        shift = torch.randn(8)
        ours.weight += shift
        plain.weight += shift
    torch.testing.assert_close(ours(x), plain(x))


def test_l2norm_is_the_host_s_and_unknown_norms_are_named(repaired):
    norm = WrappedTorchNorm(config(normalization="L2Norm"), 8)
    torch.testing.assert_close(norm(torch.full((1, 8), 3.0)), torch.ones(1, 8))
    with pytest.raises(ValueError, match="'BatchNorm' is unknown; use LayerNorm, RMSNorm or L2Norm"):
        WrappedTorchNorm(config(normalization="BatchNorm"), 8)


def test_host_refuses_sequence_parallelism_without_the_repair():
    with pytest.raises(AssertionError, match="sequence parallel"):
        WrappedTorchNorm(config(persist_layer_norm=False, memory_efficient_layer_norm=False), 8)


# --- small things ---


def test_named_random_streams_raise_no_false_alarm(repaired, caplog):
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("stream", 7)
    draw = []
    for _ in range(2):
        with tracker.fork("stream"):
            draw.append(torch.rand(3))
    assert caplog.text == "" and not torch.equal(*draw)
    assert repaired.calls(f"{random.__name__}:CudaRNGStatesTracker.fork") == 2
    logging.getLogger(random.__name__).warning("CPU RNG state changed within GPU RNG context")
    assert "CPU RNG" in caplog.text  # outside of a stream the host may speak


def test_host_s_optimizers_use_it(repaired):
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.Adam is adam.Adam is distrib_optimizer.Adam and distrib_optimizer.HAVE_APEX_OR_TE


def test_type_names_of_parameters_are_those_of_the_platform(repaired):
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 2.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=float(parameter.grad.norm()))
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(1.0))


def test_numpy_of_the_checkpoint_code_has_product_and_numpy_itself_does_not(repaired):
    from megatron.core.dist_checkpointing import exchange_utils, mapping, validation

    for module in (exchange_utils, mapping, validation):
        assert module.np.product((2, 3)) == 6 and module.np.zeros is np.zeros
    assert not hasattr(np, "product")
    assert numpy_names.NumpyOfOld().ndarray is np.ndarray


def test_numpy_that_still_has_product_is_left_alone(monkeypatch):
    monkeypatch.setattr(numpy_names.numpy, "product", np.prod, raising=False)
    assert list(numpy_names.patches(CPU)) == []


def test_write_item_is_called_with_the_format_older_torch_implied(monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoint_io.filesystem, "_write_item", lambda *args: seen.append(args))
    checkpoint_io.write_item("transforms", "stream", "data", "item", "key")
    assert seen[0][:5] == ("transforms", "stream", "data", "item", "key")
    assert seen[0][5] is checkpoint_io.filesystem.SerializationFormat.TORCH_SAVE


def test_optimizer_state_is_loaded_outside_of_autograd():
    leaf = torch.nn.Parameter(torch.zeros(2))
    checkpoint_io.without_grad(lambda target, value: target.copy_(value), leaf, torch.ones(2))
    assert torch.equal(leaf.data, torch.ones(2))
    with pytest.raises(RuntimeError, match="leaf"):
        leaf.copy_(torch.zeros(2))


def test_split_sizes_become_host_data(repaired):
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    sizes = torch.tensor([1, 2])
    assert isinstance(maybe_move_tensor_to_cpu(sizes, as_numpy=True), np.ndarray)
    assert torch.is_tensor(maybe_move_tensor_to_cpu(sizes))
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    assert isinstance(token_dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True), np.ndarray), "the alias too"
    assert repaired.calls("megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu") == 4


def test_padded_counts_name_each_expert_once():
    dispatcher = SimpleNamespace(drop_and_pad=True, num_experts=4, num_global_tokens_per_local_expert_cpu=torch.full((8,), 3))
    moe.padded_counts_of_all_experts(lambda *_: "tokens", dispatcher, None)
    assert dispatcher.num_global_tokens_per_local_expert_cpu.tolist() == [3] * 4
    dispatcher = SimpleNamespace(drop_and_pad=False)
    assert moe.padded_counts_of_all_experts(lambda *_: "tokens", dispatcher, None) == "tokens"


def test_sequence_length_of_the_auxiliary_loss_is_that_of_the_gathered_logits():
    logits = torch.zeros(2 * 16, 4)  # two sequences; 8 positions were read before the gather over two ranks
    assert moe.whole_sequence(lambda router, logits, batch, length: (batch, length), None, logits, 2, 8) == (2, 16)


def test_gradient_accumulation_fusion_is_there_and_does_not_round(repaired):
    from megatron.core.tensor_parallel import layers

    assert layers._grad_accum_fusion_available
    torch.manual_seed(0)
    x, g = torch.randn(64, 8).bfloat16(), torch.randn(64, 4).bfloat16()
    main = torch.zeros(4, 8)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, g, main)
    torch.testing.assert_close(main.double(), g.double().t() @ x.double(), rtol=1e-5, atol=1e-5)
    half = torch.zeros(4, 8, dtype=torch.bfloat16)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp16(x, g, half)
    torch.testing.assert_close(half, main.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_in_16_bits_takes_the_torch_formula(repaired, dtype):
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    softmax = FusedScaleMaskSoftmax(
        input_in_fp16=dtype is torch.float16,
        input_in_bf16=dtype is torch.bfloat16,
        attn_mask_type=AttnMaskType.causal,
        scaled_masked_softmax_fusion=True,
        mask_func=attention_mask_func,
        softmax_in_fp32=True,
        scale=None,
    )
    scores = torch.randn(2, 4, 32, 32).to(dtype)
    probabilities = softmax(scores, None)
    assert probabilities.dtype == dtype
    torch.testing.assert_close(probabilities.float().sum(-1), torch.ones(2, 4, 32), rtol=1e-2, atol=1e-2)


def test_legacy_kernels_are_not_built_off_cuda(monkeypatch):
    targets = {patch.target for patch in fused_kernels.training_patches(CPU)}
    assert targets == {"megatron.legacy.fused_kernels:load", "megatron.training.initialize:set_jit_fusion_options"}
    monkeypatch.setattr(fused_kernels.shutil, "which", lambda name: "/usr/bin/nvcc")
    assert list(fused_kernels.training_patches(CUDA)) == []
    monkeypatch.setattr(fused_kernels.shutil, "which", lambda name: None)
    assert [patch.target for patch in fused_kernels.training_patches(CUDA)] == ["megatron.legacy.fused_kernels:load"]


def test_index_functions_are_imported_and_not_made(repaired, monkeypatch):
    import subprocess

    from megatron.core.datasets.utils import compile_helpers

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("nothing may be compiled"))
    compile_helpers()
    assert repaired.calls("megatron.core.datasets.utils:compile_helpers") == 1


def test_reduce_is_handed_a_contiguous_tensor():
    seen = []
    collectives.reduce_contiguous(lambda x: seen.append(x.is_contiguous()) or x, torch.ones(2, 3).t())
    assert seen == [True]


# --- buckets ---


class Buffer:
    """The part of the host's buffer that computes with the data-parallel size."""

    def __init__(self, ranks, distributed, busbw=False):
        self.ddp_config = SimpleNamespace(use_distributed_optimizer=distributed, pad_buckets_for_high_nccl_busbw=busbw)
        self.data_parallel_world_size = ranks
        self.seen = self.data_parallel_world_size


@pytest.mark.parametrize(
    ("ranks", "distributed", "busbw", "divisor"),
    [(2, True, False, 128), (3, True, False, 384), (2, True, True, 2**16), (3, True, True, 3 * 2**16), (2, False, False, 2)],
)
def test_layout_sees_the_divisor_of_bucket_ends_and_everybody_else_the_size(ranks, distributed, busbw, divisor):
    class Repaired(Buffer):
        data_parallel_world_size = buckets.LayoutSize()

    buffer = Repaired.__new__(Repaired)
    buckets.lay_out(Buffer.__init__, buffer, ranks, distributed, busbw)
    assert buffer.seen == divisor and buffer.data_parallel_world_size == ranks
    assert vars(buffer).keys() == {"ddp_config", "data_parallel_world_size", "seen"}
