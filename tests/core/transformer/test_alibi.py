"""ALiBi: slopes by hand, the penalty at global positions under every algorithm, rules, and training."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch

from mindspeed.core.transformer.flash_attention.alibi import Alibi, alibi_slopes
from mindspeed.core.transformer.flash_attention.feature import FlashAttention
from mindspeed.errors import ConfigError
from mindspeed.patching import activation
from mindspeed.testing import ranks
from mindspeed.testing.parity import assert_same_training
from tests.core.context_parallel.dense import assert_parity
from tests.core.transformer.attention_of_a_run import HYBRID, RING, ULYSSES, attention_of, layer, plan_arguments, run_of

S = 64
BY_HAND = {
    8: [-1, -2, -3, -4, -5, -6, -7, -8],
    12: [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5],
    16: [-0.5 * (head + 1) for head in range(16)],
    40: [-0.25 * (head + 1) for head in range(32)] + [-0.125, -0.375, -0.625, -0.875, -1.125, -1.375, -1.625, -1.875],
}


@pytest.mark.parametrize("heads", BY_HAND)
def test_slopes_by_hand(heads):
    assert [math.log2(slope) for slope in alibi_slopes(heads)] == pytest.approx(BY_HAND[heads])


def penalty(slopes, kind, signed=False):
    """By the definition, [1, N, S, S]."""
    distance = torch.arange(S)[None, :].double() - torch.arange(S)[:, None]
    if kind == 3:
        distance = -distance.abs().sqrt()
    elif not signed:
        distance = -distance.abs()
    return torch.tensor(slopes, dtype=torch.float64).view(1, -1, 1, 1) * distance


def assert_alibi(world, algorithm, kind, *, heads=4, groups=2, tp=(0, 1), total=None, **more):
    arguments = plan_arguments(algorithm, world.size, position_embedding_type="alibi", alibi_fusion_attn_type=kind, **more)
    run = run_of(group=world.group, tp=tp, **arguments)
    slopes = alibi_slopes(total or heads)[tp[0] * heads : (tp[0] + 1) * heads]
    plan = run.attention.maker.plan
    for boundaries in (None, ((0, 5, 29, 64), (0, 64))):
        layout = plan.layout(S, boundaries=boundaries)
        attention = attention_of(run, layer(heads=total or heads), layout=layout)
        assert_parity(attention, layout, world.rank, bias=penalty(slopes, kind), heads=heads, groups=groups)
    run.groups.drop()


@pytest.mark.parametrize("kind", [0, 2, 3])
def test_one_device(kind):
    one = SimpleNamespace(size=1, rank=0, group=None)
    assert_alibi(one, RING, kind)
    assert_alibi(one, RING, kind, heads=6, groups=3, tp=(1, 2), total=12)


def test_signed_distance_differs_above_the_diagonal_only():
    arguments = dict(position_embedding_type="alibi", alibi_fusion_attn_type=0, alibi_diagonal_opposite=True)
    run = run_of(**arguments)
    plan = run.attention.maker.plan
    bias = penalty(alibi_slopes(4), 0, signed=True)
    assert_parity(attention_of(run, layer("no_mask")), plan.layout(S, future=None), 0, bias=bias)
    assert_parity(attention_of(run), plan.layout(S), 0, bias=penalty(alibi_slopes(4), 0))


@ranks(2)
def test_two_ranks(world):
    for algorithm in (RING, ULYSSES):
        for kind in (0, 2, 3):
            assert_alibi(world, algorithm, kind)


@ranks(4)
def test_four_ranks(world):
    assert_alibi(world, RING, 3, heads=12, groups=4, cp_window_size=2)
    for algorithm in (RING, ULYSSES, HYBRID):
        assert_alibi(world, algorithm, 2)


def settle(**arguments):
    args = argparse.Namespace(
        **{"position_embedding_type": "alibi", "use_flash_attn": False, "optimization_level": 2, **arguments}
    )
    activation.settle((Alibi(), FlashAttention()), args, platform="cpu", given=set(arguments))
    return args


def test_without_a_type_it_is_two():
    """Row 4 of the defects."""
    args = settle(alibi_fusion_attn_type=None)
    assert args.alibi_fusion_attn_type == 2 and args.use_flash_attn is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(alibi_fusion_attn_type=1), "--alibi-fusion-attn-type 1: is no ALiBi type. Use 0, 2 or 3"),
        (dict(alibi_fusion_attn_type=2, alibi_diagonal_opposite=True), "needs --alibi-fusion-attn-type 0"),
        (dict(context_parallel_size=2, context_parallel_algo="adaptive_cp_algo"), "does not work with adaptive_cp_algo"),
        (dict(context_parallel_size=2, attention_mask_type="general"), "needs --attention-mask-type causal"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, words):
    args = argparse.Namespace(
        **{
            "position_embedding_type": "alibi",
            "alibi_fusion_attn_type": 2,
            "use_flash_attn": True,
            "optimization_level": 2,
            **arguments,
        }
    )
    with pytest.raises(ConfigError, match=words):
        activation.check((Alibi(), FlashAttention()), args, platform="cpu", given=set(arguments))


def test_dropout_beside_ranks_is_not_proved_on_npu():
    args = argparse.Namespace(
        position_embedding_type="alibi", alibi_fusion_attn_type=2, use_flash_attn=True, attention_dropout=0.1
    )
    for size, platform in ((2, "cpu"), (2, "cuda"), (1, "npu")):
        args.context_parallel_size = size
        activation.check((Alibi(), FlashAttention()), args, platform=platform)
    args.context_parallel_size = 2
    with pytest.raises(ConfigError, match="--position-embedding-type alibi: with --attention-dropout 0.1 is not proved"):
        activation.check((Alibi(), FlashAttention()), args, platform="npu")


def test_training_in_other_layouts():
    alibi = "--position-embedding-type alibi --group-query-attention --num-query-groups 2"
    split = "--tensor-model-parallel-size 2 --context-parallel-size 2 --cp-comm-type p2p"
    assert_same_training(alibi, f"{alibi} {split}", world_b=4, features=["context-parallel"])
