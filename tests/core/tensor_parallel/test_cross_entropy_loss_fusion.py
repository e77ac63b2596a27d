import argparse
import math
import os

import pytest
import torch

import mindspeed
from mindspeed.core.tensor_parallel.cross_entropy_loss_fusion import OPTION, TARGET, CrossEntropyLossFusion
from mindspeed.patching import NoFlags, RunShape
from mindspeed.testing import ranks
from mindspeed.testing.operators import counted_collectives
from mindspeed.testing.parity import assert_same_training, train
from tests.core.transformer.fused_runs import LAYOUTS, assert_fused_trains_the_same

FEATURE = "cross-entropy-loss-fusion"
HOST_S_OWN = "--optimization-level 0"  # at which the host's flag means the host's own fused function


def run_with(**changes):
    return RunShape(argparse.Namespace(**{"cross_entropy_loss_fusion": True, **changes}), "cpu")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, OPTION),
        ({"cross_entropy_fusion_impl": "native"}, OPTION),
        ({"cross_entropy_fusion_impl": "te"}, ""),
        ({"cross_entropy_loss_fusion": False}, ""),
    ],
)
def test_the_host_s_flag_turns_it_on(changes, why):
    assert CrossEntropyLossFusion().why(NoFlags(), run_with(**changes)) == why


def test_transformer_engine_s_form_is_left_to_the_host_or_refused_at_start(monkeypatch):
    feature, run = CrossEntropyLossFusion(), run_with(cross_entropy_fusion_impl="te")
    (problem,) = feature.check_off(NoFlags(), run)
    assert str(problem) == (
        "--cross-entropy-fusion-impl te: needs Transformer Engine, which is not installed. "
        "Use --cross-entropy-fusion-impl native or install transformer-engine."
    )
    assert list(feature.check_off(NoFlags(), run_with(cross_entropy_loss_fusion=False, cross_entropy_fusion_impl="te"))) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "transformer_engine")
    assert list(feature.check_off(NoFlags(), run)) == []


def test_deterministic_runs_may_have_it():
    feature = CrossEntropyLossFusion()
    assert feature.host_overrides(NoFlags(), run_with(deterministic_mode=True)) == {"cross_entropy_loss_fusion": False}
    assert feature.host_overrides(NoFlags(), run_with(deterministic_mode=False)) == {}


def test_configs_of_a_program_are_made_to_ask_for_it():
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    with mindspeed.enabled(cross_entropy_loss_fusion=True):
        assert TransformerConfig(**shape).cross_entropy_loss_fusion
        assert not TransformerConfig(**shape, cross_entropy_fusion_impl="te").cross_entropy_loss_fusion
    assert not TransformerConfig(**shape).cross_entropy_loss_fusion


# ---- beside the host's own fused function --------------------------------------------------------------------------------------


def loss_gradient_and_collectives(logits, target, group):
    from megatron.core.models.common.language_module import language_module

    leaf = logits.clone().requires_grad_()
    with counted_collectives() as counted:
        # fp32 logits would be overwritten by the host's, hence the product
        loss = language_module.fused_vocab_parallel_cross_entropy(leaf * 1, target, group)
        loss.backward(torch.linspace(-1, 1, loss.numel()).view_as(loss))
    return loss.detach(), leaf.grad, counted


def compare(world, dtype):
    generator = torch.Generator().manual_seed(3)
    columns = 40
    whole = (4 * torch.randn(6, 2, columns * world.size, generator=generator)).to(dtype)
    logits = whole[..., world.rank * columns : (world.rank + 1) * columns].contiguous()
    target = torch.randint(0, columns * world.size, (6, 2), generator=generator)
    with mindspeed.enabled():
        theirs = loss_gradient_and_collectives(logits, target, world.group)
    with mindspeed.enabled(cross_entropy_loss_fusion=True) as handle:
        ours = loss_gradient_and_collectives(logits, target, world.group)
        assert handle.ledger.calls(TARGET) == 1
    assert ours[0].dtype == theirs[0].dtype == torch.float32 and ours[1].dtype == dtype
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    # the host rounds every gradient to bfloat16, whatever the dtype of the logits
    torch.testing.assert_close(ours[1].bfloat16(), theirs[1].bfloat16(), rtol=8e-3, atol=1e-6)
    if dtype == torch.bfloat16:
        same = (ours[1] == theirs[1]).float().mean()
        assert same > 0.99, f"{same:.4f} of the gradients agree bit for bit"
    assert len(ours[2]) <= len(theirs[2]) == 2 and set(ours[2]) <= {"all_reduce"}


@ranks(1, megatron=True)
def test_host_s_call_on_one_rank(world):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        compare(world, dtype)


@ranks(2, megatron=True)
def test_host_s_call_on_two_ranks(world):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        compare(world, dtype)


# ---- training -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_host_s(layout):
    """In fp32 beside the host's unfused loss: its fused one rounds the gradient of logits to bfloat16."""
    assert_fused_trains_the_same(layout, OPTION, [FEATURE], [TARGET])


@pytest.mark.parametrize(("extra", "world"), [("", 1), ("--tensor-model-parallel-size 2 --sequence-parallel", 2)])
def test_training_in_bfloat16_is_that_of_the_host_s_fused_function(extra, world):
    flags = f"--num-layers 2 --bf16 {extra} {OPTION}"
    theirs, ours = (train(f"{flags} {own}", world=world, steps=10) for own in (HOST_S_OWN, ""))
    assert FEATURE in ours.features - theirs.features
    assert len(ours.losses) == len(theirs.losses) == 10
    for a, b in zip(ours.losses + ours.grad_norms, theirs.losses + theirs.grad_norms, strict=True):
        assert math.isclose(a, b, rel_tol=2e-4), (ours.losses, theirs.losses, ours.grad_norms, theirs.grad_norms)


def test_the_last_pipeline_stage_computes_it():
    layout = "--num-layers 4 --pipeline-model-parallel-size 2"
    _, ours = assert_same_training(layout, f"{layout} {OPTION}", 2, 2, steps=3, features=[FEATURE], called=[TARGET])
    assert {row.calls for row in ours.patches if row.target == TARGET} == {3 * 4}  # steps and micro batches


def test_further_tokens_predicted_have_it_too():
    common = "--num-layers 2 --position-embedding-type rope --mtp-num-layers 1"
    _, ours = assert_same_training("", OPTION, steps=3, common=common, features=[FEATURE], called=[TARGET])
    assert {row.calls for row in ours.patches if row.target == TARGET} == {3 * 4 * 2}


@pytest.mark.megatron_lm
@pytest.mark.timeout(600)
@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout")
def test_training_in_megatron_lm():
    common = "--num-layers 2 --tensor-model-parallel-size 2 --sequence-parallel"
    assert_same_training("", OPTION, 2, steps=4, host="megatron-lm", common=common, features=[FEATURE], called=[TARGET])
