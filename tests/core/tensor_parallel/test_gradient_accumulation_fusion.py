import argparse

import pytest
import torch

import mindspeed
from mindspeed.core.tensor_parallel.gradient_accumulation_fusion import EXTENSION, LAYERS, GradientAccumulationFusion
from mindspeed.patching import NoFlags, RunShape
from mindspeed.testing.parity import assert_same_training

CALLED = f"{LAYERS}:{EXTENSION}.wgrad_gemm_accum_fp32"


def test_host_s_flag_decides_and_one_of_its_places_is_refused():
    feature = GradientAccumulationFusion()
    run = RunShape(argparse.Namespace(gradient_accumulation_fusion=True, defer_embedding_wgrad_compute=True), "cpu")
    assert feature.why(NoFlags(), run) == "host's default"
    (problem,) = feature.check(NoFlags(), run)
    assert str(problem).startswith(f"--defer-embedding-wgrad-compute: needs the extension {EXTENSION} of Apex")
    off = RunShape(argparse.Namespace(gradient_accumulation_fusion=False), "cpu")
    assert feature.why(NoFlags(), off) == "" and list(feature.check(NoFlags(), off)) == []


def test_sums_over_micro_batches_are_more_exact_than_without():
    from megatron.core.tensor_parallel import layers

    torch.manual_seed(0)
    batches = [(torch.randn(16, 8).bfloat16(), torch.randn(16, 4).bfloat16()) for _ in range(100)]
    exact = sum(dy.double().t() @ x.double() for x, dy in batches)
    rounded, fused, half = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.bfloat16)
    with mindspeed.enabled() as handle:
        extension = layers.fused_weight_gradient_mlp_cuda
        for x, dy in batches:
            extension.wgrad_gemm_accum_fp32(x, dy, fused)
            extension.wgrad_gemm_accum_fp16(x, dy, half)
            rounded += dy.t() @ x
        assert handle.ledger.calls(CALLED) == 100
    assert (fused - exact).abs().max() < (rounded - exact).abs().max() / 100
    assert (half - exact).abs().max() < 1.0


@pytest.mark.parametrize(("flags", "world"), [("", 1), ("--tensor-model-parallel-size 2 --sequence-parallel", 2)])
def test_training_equals_the_unfused(flags, world):
    common = f"--num-layers 2 {flags}"
    fused = ["gradient-accumulation-fusion"]
    assert_same_training(
        "--no-gradient-accumulation-fusion", "", world, steps=10, common=common, features=fused, called=[CALLED]
    )


def test_disabling_it_is_the_host_s_flag():
    flags = "--no-gradient-accumulation-fusion", "--disable-fused-ops wgrad"
    _, second = assert_same_training(*flags, steps=3, rtol=0, weight_atol=0, common="--num-layers 2")
    assert "gradient-accumulation-fusion" not in second.features
