"""The parity harness: layouts agree, the trainer equals hand-written megatron-core calls, and differences are found."""

import os

import pytest
import torch

import mindspeed
from mindspeed.testing import assert_same_training, train
from mindspeed.testing.parity import Calls, TrainingRecord, _assert_features_ran, _merge, _RankRecord
from mindspeed.testing.pool import pools
from mindspeed.testing.whole_weights import Part, join

LAYOUTS = {
    "dp2": "",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "pp2-vpp": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_train_the_same(layout):
    first, _ = assert_same_training("", LAYOUTS[layout], world_b=2)
    assert len(first.weights) > 40 and first.weights["embedding.word_embeddings.weight"].shape == (4224, 64)


def test_gated_bf16_and_grouped_queries_can_be_compared():
    common = "--swiglu --bf16 --normalization RMSNorm --group-query-attention --num-query-groups 2 --disable-bias-linear"
    assert_same_training("", "--tensor-model-parallel-size 2", world_b=2, steps=2, rtol=2e-3, weight_atol=2e-3, common=common)


def _by_hand(world, **sizes):
    from mindspeed.testing.tiny_gpt import TinyGpt, TinyTraining

    with mindspeed.enabled():
        training = TinyTraining(TinyGpt(**sizes))
        for _ in range(3):
            training.step()
    return training.losses, training.grad_norms


def test_the_trainer_equals_megatron_core_calls_bit_for_bit():
    record = train("", world=1, steps=3)
    (calls,) = pools().get(1, megatron=True).run(_by_hand)
    losses, grad_norms = calls
    assert record.losses == losses
    assert record.grad_norms == torch.tensor(grad_norms).tolist(), "the trainer logs norms in float32"


def test_a_different_run_is_found():
    with pytest.raises(AssertionError, match="loss curves differ by more than"):
        assert_same_training("", "--lr 2e-3")
    with pytest.raises(AssertionError, match="weights in one run only"):
        assert_same_training("", "", rename=lambda name: name.replace("layers.0", "layers.9"))


def test_a_feature_whose_patches_slept_is_found():
    plain = TrainingRecord([], [])
    slept = TrainingRecord([], [], frozenset({"f"}), (Calls("f", "a.b:c", 0), Calls("f", "a.b:d", 0)))
    ran = TrainingRecord([], [], frozenset({"f"}), (Calls("f", "a.b:c", 0), Calls("f", "a.b:d", 2)))
    _assert_features_ran(plain, ran, ["f"], ["a.b:d"])
    with pytest.raises(AssertionError, match="no patch of f was called"):
        _assert_features_ran(plain, slept, [], [])
    with pytest.raises(AssertionError, match="a.b:c was not called"):
        _assert_features_ran(plain, ran, [], ["a.b:c"])
    with pytest.raises(AssertionError, match=r"expected \['g'\]"):
        _assert_features_ran(plain, ran, ["g"], [])


def test_diverged_replicas_and_missing_parts_are_found():
    left = Part("w", (4,), (0,), torch.zeros(2))
    right = Part("w", (4,), (2,), torch.ones(2))
    assert join([[left], [right], [left]])["w"].tolist() == [0, 0, 1, 1]
    with pytest.raises(AssertionError, match=r"different copies of \{'w': 1.0\}"):
        join([[left, right], [Part("w", (4,), (0,), torch.tensor([0.0, 1.0]))]])
    with pytest.raises(AssertionError, match="no rank holds all of"):
        join([[left]])
    with pytest.raises(AssertionError, match="different gradient norms"):
        _merge([_RankRecord([1.0], [1.0]), _RankRecord([1.0], [2.0])])


@pytest.mark.megatron_lm
@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout")
def test_megatron_lm_prints_the_digits_of_the_trainer():
    ours = train("", steps=2)
    theirs = train("", steps=2, host="megatron-lm")
    assert ours.losses == theirs.losses and ours.grad_norms == theirs.grad_norms
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)
