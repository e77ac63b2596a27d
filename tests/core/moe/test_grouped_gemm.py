import argparse

import pytest
import torch

from mindspeed.core.moe.grouped_gemm import GroupedGemm, GroupedGemmFlags, gmm, plain_gmm
from mindspeed.patching import RunShape
from mindspeed.testing.parity import assert_same_training
from tests.core.moe.test_permute_fusion import MOE

OPTION = "--gemm-gradient-accumulation-fusion"
ON = GroupedGemmFlags(gemm_gradient_accumulation_fusion=True)
BUILT = "megatron.core.transformer.moe.grouped_gemm_util:assert_grouped_gemm_is_available"


def problems(**changes):
    args = argparse.Namespace(**{"moe_grouped_gemm": True, "transformer_impl": "local", **changes})
    return [str(problem) for problem in GroupedGemm().check(ON, RunShape(args, "cpu"))]


def test_a_request_is_granted_or_refused_with_the_reason(monkeypatch):
    assert problems() == problems(fp16=True, accumulate_allreduce_grads_in_fp32=True) == []
    assert problems(moe_grouped_gemm=False) == [
        f"{OPTION}: needs --moe-grouped-gemm. Add --moe-grouped-gemm or remove {OPTION}."
    ]
    (message,) = problems(fp16=True)
    assert "adds in float32, and main_grad has 16 bits with --fp16" in message
    for name in ("gmm", "wgrad"):
        (message,) = problems(disable_fused_ops=name)
        assert f"contradicted by --disable-fused-ops {name}" in message
    monkeypatch.setattr("mindspeed.core.moe.grouped_gemm.uses_transformer_engine", lambda run: True)
    (message,) = problems()
    assert "--transformer-impl transformer_engine brings others" in message
    assert problems(moe_use_legacy_grouped_gemm=True) == []


@pytest.mark.parametrize(("flags", "on"), [({"bf16": True}, {}), ({"bf16": False}, {"moe_grouped_gemm": False})])
def test_host_s_limit_to_bf16_is_lifted(flags, on):
    run = RunShape(argparse.Namespace(moe_grouped_gemm=True, **flags), "cpu")
    assert GroupedGemm().why(GroupedGemmFlags(), run) == "--moe-grouped-gemm"
    assert GroupedGemm().host_overrides(GroupedGemmFlags(), run) == on


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_goes_to_main_grad_of_the_parameter_behind_the_view(transposed):
    torch.manual_seed(0)
    sizes = torch.tensor([3, 0, 4])
    x = torch.randn(7, 5)
    parameter = torch.nn.Parameter(torch.randn(5, 3 * 6))
    shape = (3, 6, 5) if transposed else (3, 5, 6)
    plain_gmm(x, parameter.view(shape), sizes, transposed).square().sum().backward()
    expected, parameter.grad = parameter.grad.clone(), None
    gmm(x, parameter.view(shape), sizes, transposed).square().sum().backward()
    torch.testing.assert_close(parameter.grad, expected)
    if not transposed:
        with pytest.raises(ValueError, match="original_weight must have a main_grad"):
            gmm(x, parameter.view(shape), sizes, accumulate=True)
        with torch.no_grad():
            torch.testing.assert_close(
                gmm(x, parameter.view(shape), sizes, accumulate=True), plain_gmm(x, parameter.view(shape), sizes)
            )
        parameter.grad, parameter.main_grad, parameter.grad_added_to_main_grad = None, torch.ones(5, 18), False
        gmm(x, parameter.view(shape), sizes, accumulate=True).square().sum().backward()
        torch.testing.assert_close(parameter.main_grad, expected + 1)
        assert parameter.grad_added_to_main_grad is True and parameter.grad.shape == parameter.shape


def test_training_with_two_expert_ranks_equals_one_expert_after_the_other():
    on = {"features": ["grouped-gemm"], "called": [BUILT]}
    assert_same_training("", "--moe-grouped-gemm", 2, steps=10, common=MOE, rtol=2e-6, **on)
    assert_same_training("", f"--moe-grouped-gemm {OPTION}", 2, steps=10, common=MOE, rtol=2e-6, **on)


def test_loop_of_products_trains_the_same():
    assert_same_training("", "--disable-fused-ops gmm", 2, steps=10, common=f"{MOE} --moe-grouped-gemm", rtol=2e-6)


def test_accumulation_in_16_bits_stays_close_to_the_rounded_one():
    common = f"{MOE} --moe-grouped-gemm --bf16"
    assert_same_training("", OPTION, 2, steps=5, common=common, called=[BUILT], rtol=1e-2, weight_atol=5e-3)


def test_all_fused_operators_of_experts_together():
    flags = f"--moe-grouped-gemm {OPTION} --use-fused-swiglu --moe-permute-fusion"
    names = ["fused-swiglu", "moe-permute-fusion", "grouped-gemm"]
    assert_same_training("", flags, 2, steps=10, common=MOE, features=names, rtol=2e-6)


def test_all_fused_operators_under_tensor_and_sequence_parallelism():
    """Experts on two tensor-parallel ranks, with everything that moves or multiplies their tokens fused."""
    experts = (
        "--num-layers 2 --num-experts 4 --moe-router-topk 2 --disable-bias-linear --swiglu --moe-token-dispatcher-type alltoall"
    )
    common = (
        f"{experts} --tensor-model-parallel-size 2 --sequence-parallel --normalization RMSNorm --position-embedding-type rope"
    )
    flags = (
        f"--moe-grouped-gemm {OPTION} --use-fused-swiglu --moe-permute-fusion --use-fused-rmsnorm --use-fused-rotary-pos-emb"
    )
    names = ["fused-swiglu", "moe-permute-fusion", "grouped-gemm", "fused-rmsnorm", "fused-rotary-pos-emb"]
    assert_same_training("", flags, 2, steps=10, common=common, features=names, rtol=1e-5)
