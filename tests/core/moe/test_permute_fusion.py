import argparse

import pytest
import torch

import mindspeed
from mindspeed.core.moe.permute_fusion import UTILS, MoePermuteFusion, PermuteFlags
from mindspeed.patching import RunShape
from mindspeed.testing.parity import assert_same_training

OPTION = "--use-fused-moe-token-permute-and-unpermute"
ON = PermuteFlags(use_fused_moe_token_permute_and_unpermute=True)
MOE = (
    "--num-layers 2 --num-experts 4 --moe-router-topk 2 --disable-bias-linear --swiglu --expert-model-parallel-size 2 "
    "--moe-token-dispatcher-type alltoall"
)


def problems(platform="cpu", flags=ON, **changes):
    args = argparse.Namespace(**{"num_experts": 4, "moe_token_dispatcher_type": "alltoall", **changes})
    return [str(problem) for problem in MoePermuteFusion().check(flags, RunShape(args, platform))]


def test_a_request_is_granted_or_refused_with_the_reason():
    assert problems() == problems(moe_expert_capacity_factor=1.0) == []
    assert problems("npu", moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True) == []
    assert problems(num_experts=None) == [f"{OPTION}: needs --num-experts. Remove {OPTION}."]
    for dispatcher in ("allgather", "alltoall_seq"):
        (message,) = problems(flags=PermuteFlags(), moe_permute_fusion=True, moe_token_dispatcher_type=dispatcher)
        assert message.startswith(f"--moe-permute-fusion: is not served by --moe-token-dispatcher-type {dispatcher}")
    (message,) = problems("npu", moe_expert_capacity_factor=1.0)
    assert "needs --moe-pad-expert-input-to-capacity on NPU" in message
    (message,) = problems(disable_fused_ops="permute")
    assert "contradicted by --disable-fused-ops permute" in message


def test_both_names_mean_the_host_s_flag():
    feature, run = MoePermuteFusion(), RunShape(argparse.Namespace(moe_permute_fusion=True), "cpu")
    assert feature.why(ON, run) == OPTION and feature.why(PermuteFlags(), run) == "--moe-permute-fusion"
    assert [(change.dest, change.value) for change in feature.normalise(ON, run)] == [("moe_permute_fusion", True)]
    assert list(feature.normalise(PermuteFlags(), run)) == []


@pytest.fixture
def host():
    from megatron.core.transformer.moe import moe_utils

    with mindspeed.enabled(num_experts=4, moe_permute_fusion=True, moe_token_dispatcher_type="alltoall") as handle:
        yield moe_utils, handle


def routing(kind):
    probs = torch.rand(6, 4)
    if kind == "drop and pad":  # three tokens for each expert
        rows = torch.rand(6, 4).argsort(0)[:3]
        return torch.zeros(6, 4, dtype=torch.bool).scatter_(0, rows, True), probs
    chosen = probs.topk(2, 1).indices
    return torch.zeros(6, 4, dtype=torch.bool).scatter_(1, chosen, True), probs


@pytest.mark.parametrize("kind", ["top 2", "drop and pad"])
def test_values_and_gradients_are_those_of_the_unfused_functions(host, kind):
    utils, handle = host
    torch.manual_seed(0)
    drop = kind == "drop and pad"
    routing_map, probs = routing(kind)
    tokens = torch.randn(6, 8)
    results = []
    for fused in (False, True):
        leaves = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        count = int(routing_map.sum())
        rows, weights, order = utils.permute(leaves[0], routing_map, leaves[1], count, fused, drop)
        whole = utils.unpermute(rows * weights[:, None], order, tokens.shape, fused=fused, drop_and_pad=drop)
        again = utils.unpermute(rows, order, tokens.shape, leaves[1], routing_map, fused=fused, drop_and_pad=drop)
        (whole.square() + again).sum().backward()
        results.append([rows.detach(), weights.detach(), whole.detach(), again.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)
    assert handle.ledger.calls(f"{UTILS}:permute") == 2 and handle.ledger.calls(f"{UTILS}:unpermute") == 4


def test_chunks_are_sorted_as_by_the_unfused_function(host):
    utils, _ = host
    x, probs = torch.randn(7, 3), torch.rand(7)
    sizes, order = torch.tensor([2, 0, 4, 1]), torch.tensor([2, 0, 3, 1])
    theirs = utils.sort_chunks_by_idxs(x, sizes, order, probs)
    torch.testing.assert_close(utils.sort_chunks_by_idxs(x, sizes, order, probs, fused=True), theirs)
    assert utils.sort_chunks_by_idxs(x, sizes, order, fused=True)[1] is None


def test_maps_of_rows_cannot_be_mixed_up(host):
    utils, _ = host
    tokens, (routing_map, probs) = torch.randn(6, 8), routing("top 2")
    rows, _, ours = utils.permute(tokens, routing_map, probs, 12, True)
    _, _, theirs = utils.permute(tokens, routing_map, probs, 12, False)
    with pytest.raises(TypeError, match="comes from a fused permute"):
        utils.unpermute(rows, ours, tokens.shape)
    with pytest.raises(TypeError, match="row_map must be a RowMap"):
        utils.unpermute(rows, theirs, tokens.shape, fused=True)


def test_calls_of_transformer_engine_are_understood(host):
    utils, _ = host
    tokens, (routing_map, probs) = torch.randn(6, 8), routing("top 2")
    rows, order = utils.fused_permute(tokens, routing_map, num_out_tokens=12)
    again, weights, _ = utils.fused_permute_with_probs(tokens, probs, routing_map, num_out_tokens=12)
    assert torch.equal(rows, again) and weights.shape == (12,)
    whole = utils.fused_unpermute(rows, order, merging_probs=probs, restore_shape=tokens.shape)
    torch.testing.assert_close(whole, tokens * (probs * routing_map).sum(1, keepdim=True))
    sizes, places = torch.tensor([5, 7]), torch.tensor([1, 0])
    moved, moved_weights = utils.fused_sort_chunks_by_index_with_probs(rows, weights, sizes, places)
    assert torch.equal(moved, utils.fused_sort_chunks_by_index(rows, sizes, places))
    assert torch.equal(moved_weights, torch.cat([weights[5:], weights[:5]]))


def test_configs_of_a_program_are_made_to_ask_for_it(host):
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "add_bias_linear": False}
    experts = {"num_moe_experts": 4, "moe_token_dispatcher_type": "alltoall"}
    assert TransformerConfig(**shape, **experts).moe_permute_fusion and not TransformerConfig(**shape).moe_permute_fusion


@pytest.mark.parametrize("padding", ["", "--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity"])
def test_training_with_two_expert_ranks_equals_the_unfused(padding):
    called = [f"{UTILS}:{name}" for name in ("permute", "unpermute", *(() if padding else ("sort_chunks_by_idxs",)))]
    names = ["moe-permute-fusion"]
    assert_same_training("", OPTION, 2, steps=10, common=f"{MOE} {padding}", features=names, called=called, rtol=2e-6)
