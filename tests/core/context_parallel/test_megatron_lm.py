"""Megatron-LM's own pretrain script: every algorithm at context-parallel size 2, and size 2 beside other layouts."""

import os

import pytest

from mindspeed.testing.parity import assert_same_training

pytestmark = [
    pytest.mark.megatron_lm,
    pytest.mark.skipif(
        not os.environ.get("MEGATRON_LM_PATH"), reason="set MEGATRON_LM_PATH to a Megatron-LM checkout of core_v0.12.1"
    ),
]
ROPE = "--position-embedding-type rope --group-query-attention --num-query-groups 2"
TWO = "--context-parallel-size 2"
EVERY_CHANGE = {
    "ring": f"{TWO} --use-cp-send-recv-overlap",
    "ulysses": f"{TWO} --context-parallel-algo ulysses_cp_algo",
}
ALGORITHMS = {
    "kvallgather": f"{TWO} --context-parallel-algo kvallgather_cp_algo",
    "adaptive": f"{TWO} --context-parallel-algo adaptive_cp_algo",
    "ring of blocks": f"{TWO} --attention-mask-type general",
    "cache": f"{TWO} --context-parallel-kv-cache-policy full",
    "distributed optimizer": f"{TWO} --use-distributed-optimizer --recompute-granularity selective",
}
FOUR = {
    "hybrid": "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
    "double ring": "--context-parallel-size 4 --cp-window-size 2",
    "TP2 SP": f"{TWO} --tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": f"{TWO} --pipeline-model-parallel-size 2",
}


def assert_trains_as_one(flags, world):
    first, second = assert_same_training(
        ROPE, f"{ROPE} {flags}", world_b=world, host="megatron-lm", features=["context-parallel"]
    )
    print(f"{flags}: {first.losses} and {second.losses}")


@pytest.mark.parametrize("name", EVERY_CHANGE)
def test_two_ranks(name):
    assert_trains_as_one(EVERY_CHANGE[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm(name):
    assert_trains_as_one(ALGORITHMS[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name):
    assert_trains_as_one(FOUR[name], 4)


@pytest.mark.slow
def test_bf16_is_as_close_as_its_rounding():
    """Merging in fp32 keeps two ranks as near to fp32 as one rank is."""
    flags = f"{ROPE} --bf16"
    assert_same_training(flags, f"{flags} {TWO}", world_b=2, host="megatron-lm", rtol=5e-3, weight_atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["--position-embedding-type alibi", "--multi-latent-attention --kv-lora-rank 16 --v-head-dim 16"]
)
def test_other_models(model):
    flags = f"{model} --use-flash-attn"
    split = f"{flags} {TWO} --context-parallel-algo ulysses_cp_algo"
    assert_same_training(flags, split, world_b=2, host="megatron-lm", features=["context-parallel"])
