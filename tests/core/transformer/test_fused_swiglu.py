import argparse
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import mindspeed
from mindspeed.core.transformer.fused_swiglu import FusedSwiglu, SwigluFlags, build_experts, weighted
from mindspeed.patching import RunShape
from tests.core.transformer.fused_runs import LAYOUTS, assert_fused_trains_the_same

HOST = "megatron.core.fusions.fused_bias_swiglu"


def problems(**changes):
    args = argparse.Namespace(**{"swiglu": True, "bias_swiglu_fusion": True, **changes})
    return [str(problem) for problem in FusedSwiglu().check(SwigluFlags(use_fused_swiglu=True), RunShape(args, "cpu"))]


def test_a_request_is_granted_or_refused_with_the_reason():
    assert problems() == []
    assert problems(swiglu=False) == ["--use-fused-swiglu: needs --swiglu. Add --swiglu or remove --use-fused-swiglu."]
    (message,) = problems(bias_swiglu_fusion=False)
    assert "contradicted by --no-bias-swiglu-fusion" in message
    (message,) = problems(disable_fused_ops="swiglu")
    assert "contradicted by --disable-fused-ops swiglu" in message


@pytest.mark.parametrize(
    ("changes", "on"),
    [({}, True), ({"swiglu": False}, False), ({"bias_swiglu_fusion": False}, False), ({"disable_fused_ops": "swiglu"}, False)],
)
def test_without_the_flag_the_device_decides(monkeypatch, changes, on):
    monkeypatch.setattr("mindspeed.core.transformer.fused_choice.device_kernel", lambda operator, device: "triton")
    args = argparse.Namespace(**{"swiglu": True, "bias_swiglu_fusion": True, **changes})
    assert bool(FusedSwiglu().why(SwigluFlags(), RunShape(args, "cuda"))) is on
    assert FusedSwiglu().why(SwigluFlags(), RunShape(args, "cpu")) == ""


def with_gradients(function, *inputs):
    """Output of a call and the gradients of its inputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    out.backward(torch.ones_like(out) * 0.5)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def test_host_s_calls_give_its_values_and_gradients():
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

    torch.manual_seed(0)
    x, bias, weights = torch.randn(6, 2, 16), torch.randn(16), torch.rand(12, 1)
    cases = [
        case
        for fp8 in (False, True)
        for case in (
            (lambda x, fp8=fp8: bias_swiglu_impl(x, None, fp8), x),
            (lambda x, bias, fp8=fp8: bias_swiglu_impl(x, bias, fp8), x, bias),
            (lambda x, w, fp8=fp8: weighted_bias_swiglu_impl(x, None, w, fp8), x.view(12, 16), weights),
        )
    ]
    with mindspeed.enabled(swiglu=True):
        theirs = [with_gradients(*case) for case in cases]
    with mindspeed.enabled(swiglu=True, use_fused_swiglu=True) as handle:
        torch.testing.assert_close([with_gradients(*case) for case in cases], theirs)
        rows = [row for row in handle.ledger.rows if row.owner == "fused-swiglu" and row.target.startswith(f"{HOST}:")]
        assert [row.calls for row in rows] == [2] * 6


@pytest.mark.parametrize(
    ("activation", "fusion", "ours"),
    [(functional.silu, True, True), (functional.silu, False, False), (functional.gelu, True, False)],
)
def test_experts_get_the_weighted_operator_for_silu_alone(activation, fusion, ours):
    config = SimpleNamespace(gated_linear_unit=True, activation_func=activation, bias_activation_fusion=fusion)
    experts = SimpleNamespace()

    def original(experts, count, config):
        experts.config, experts.activation_func_with_probs = config, "theirs"

    build_experts(original, experts, 2, config=config)
    assert (experts.activation_func_with_probs is weighted) is ours


def test_configs_of_a_program_are_made_to_ask_for_it():
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    gated = {"gated_linear_unit": True, "activation_func": functional.silu}
    before = TransformerConfig(**shape, **gated)
    with mindspeed.enabled(before, use_fused_swiglu=True):
        assert before.bias_activation_fusion and TransformerConfig(**shape, **gated).bias_activation_fusion
        assert not TransformerConfig(**shape).bias_activation_fusion
    assert not before.bias_activation_fusion and not TransformerConfig(**shape, **gated).bias_activation_fusion


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_host_s(layout):
    called = [f"{HOST}:BiasSwiGLUFunction.forward", f"{HOST}:BiasSwiGLUFunction.backward"]
    assert_fused_trains_the_same(layout, "--use-fused-swiglu", ["fused-swiglu"], called)
