"""Rules of context parallelism, one message each; and training at every size equal to one process."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from mindspeed.core.context_parallel.context_parallel import ContextParallel
from mindspeed.core.context_parallel.kv_cache_policy import KvCachePolicy
from mindspeed.core.transformer.flash_attention.feature import FlashAttention
from mindspeed.errors import ConfigError
from mindspeed.notices import warn_once
from mindspeed.patching import activation
from mindspeed.testing import ranks
from mindspeed.testing.parity import assert_same_training
from tests.core.transformer.attention_of_a_run import plan_arguments, run_of
from tests.training.runs import TINY, train

FEATURES = (ContextParallel(), KvCachePolicy(), FlashAttention())
RUN = dict(
    context_parallel_size=4,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    num_layers=12,
    num_attention_heads=8,
    num_query_groups=1,
    group_query_attention=False,
    seq_length=64,
    reset_attention_mask=False,
    use_flash_attn=True,
    create_attention_mask_in_dataloader=False,
    cp_comm_type=["p2p"],
    context_parallel_algo="megatron_cp_algo",
    attention_mask_type="causal",
    optimization_level=2,
)


def messages(given=(), **changes):
    args = argparse.Namespace(**{**RUN, **changes})
    try:
        activation.check(FEATURES, args, platform="cpu", given={*given, *changes})
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_a_sound_run_is_accepted():
    assert messages() == []
    assert messages(context_parallel_algo="ulysses_cp_algo") == []
    assert messages(context_parallel_algo="hybrid_cp_algo", ulysses_degree_in_cp=2) == []
    assert messages(cp_window_size=2, context_parallel_kv_cache_policy="half", context_parallel_cache_interval=3) == []


ULYSSES, HYBRID = {"context_parallel_algo": "ulysses_cp_algo"}, {"context_parallel_algo": "hybrid_cp_algo"}
POLICY = {"context_parallel_kv_cache_policy": "full"}
BAD = {
    "level": (dict(optimization_level=1), "--context-parallel-size 4: needs --optimization-level 2 (given 1)"),
    "level of a policy": (dict(optimization_level=1, **POLICY), "-policy full: needs --optimization-level 2"),
    "length zigzag": (
        dict(seq_length=60),
        "must be a multiple of 2 x --context-parallel-size = 8 for megatron_cp_algo. Use 56 or 64",
    ),
    "length blocks": (dict(seq_length=62, **ULYSSES), "must be a multiple of --context-parallel-size = 4"),
    "length general": (dict(seq_length=62, attention_mask_type="general"), "must be a multiple of --context-parallel-size = 4"),
    "heads": (
        dict(num_attention_heads=6, **ULYSSES),
        "must be divisible by --context-parallel-size 4 x --tensor-model-parallel-size 1",
    ),
    "usable": (dict(num_attention_heads=6, **ULYSSES), "Usable sizes: 2, 3, 6"),
    "heads hybrid": (
        dict(num_attention_heads=6, ulysses_degree_in_cp=2, tensor_model_parallel_size=2, **HYBRID),
        "--ulysses-degree-in-cp 2 x --tensor-model-parallel-size 2",
    ),
    "groups": (
        dict(group_query_attention=True, num_query_groups=3),
        "--num-query-groups 3: must divide --num-attention-heads 8",
    ),
    "groups tp": (
        dict(group_query_attention=True, num_query_groups=2, tensor_model_parallel_size=4),
        "must be a multiple of --tensor-model-parallel-size 4",
    ),
    "degree missing": (HYBRID, "--ulysses-degree-in-cp: is required by hybrid_cp_algo. Use 2"),
    "degree whole": (dict(ulysses_degree_in_cp=4, **HYBRID), "Use --context-parallel-algo ulysses_cp_algo"),
    "degree uneven": (dict(ulysses_degree_in_cp=3, **HYBRID), "must divide --context-parallel-size 4"),
    "window": (dict(cp_window_size=3), "must be smaller than, and divide, the ring of 4 ranks. Use 2"),
    "window whole": (dict(cp_window_size=4), "--cp-window-size 4"),
    "window hybrid": (dict(cp_window_size=2, ulysses_degree_in_cp=2, **HYBRID), "the ring of 2 ranks"),
    "comm type": (dict(cp_comm_type=["p2p"], **ULYSSES), "contradicts --context-parallel-algo ulysses_cp_algo"),
    "comm types": (dict(cp_comm_type=["p2p", "a2a"]), "different types per layer"),
    "policy alone": (dict(context_parallel_size=1, **POLICY), "needs --context-parallel-size above 1"),
    "policy gather": (dict(context_parallel_algo="kvallgather_cp_algo", **POLICY), "does not work with kvallgather_cp_algo"),
    "policy useless": (dict(**POLICY, **ULYSSES), "saves nothing: 8 key heads per rank need no repetition over 4 ranks"),
    "interval alone": (dict(context_parallel_cache_interval=1), "needs a cache policy"),
    "interval negative": (dict(context_parallel_cache_interval=-1, **POLICY), "at least 0"),
    "interval long": (dict(context_parallel_cache_interval=12, **POLICY), "must be smaller than --num-layers 12"),
    "allgather ring": (
        dict(use_ulysses_allgather_kv=True, group_query_attention=True),
        "needs --context-parallel-algo ulysses_cp_algo",
    ),
    "allgather mha": (dict(use_ulysses_allgather_kv=True, **ULYSSES), "needs --group-query-attention"),
    "allgather groups": (
        dict(use_ulysses_allgather_kv=True, group_query_attention=True, num_query_groups=2, **ULYSSES),
        "needs one key head per tensor-parallel rank, there are 2",
    ),
    "mode": (dict(sparse_mode=6), "--sparse-mode 6: 5 to 8 are internal modes"),
    "band": (dict(sparse_mode=4, pre_tockens=1, next_tockens=-3), "rows would see no key"),
    "mtp": (dict(mtp_num_layers=1), "--mtp-num-layers 1"),
    "window size": (dict(window_size=(8, 0)), "window_size (8, 0): is not supported"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_rule_names_flag_value_and_remedy(name):
    changes, words = BAD[name]
    found = messages(**changes)
    assert any(words in message for message in found), found
    assert all(message.startswith(("--", "window_size")) and message.count(": ") >= 1 for message in found)


@pytest.mark.parametrize(
    ("dest", "value"),
    [("use_cp_send_recv_overlap", True), ("use_fused_ring_attention_update", True), ("cp_kv_gradient_dtype", "bf16")],
)
def test_flags_of_the_ring_say_so_without_one(dest, value, caplog):
    warn_once.cache_clear()
    option = "--" + dest.replace("_", "-")
    assert messages(**{dest: value}) == [] and option not in caplog.text
    assert messages(**{dest: value}, **ULYSSES) == []
    assert f"{option} has no effect with ulysses_cp_algo" in caplog.text


@pytest.mark.parametrize("platform", ["cuda", "npu"])
def test_determinism_is_not_promised_on_other_devices(platform):
    args = argparse.Namespace(**RUN, deterministic_mode=True)
    with pytest.raises(ConfigError, match=f"--deterministic-mode: is not proved for context parallelism on {platform}"):
        activation.check(FEATURES, args, platform=platform)


def test_all_problems_come_at_once():
    found = messages(seq_length=62, num_attention_heads=6, context_parallel_cache_interval=1, **ULYSSES)
    assert len(found) == 3


def test_the_hosts_own_flag_chooses_an_algorithm():
    args = argparse.Namespace(**{**RUN, "cp_comm_type": ["a2a"]})
    activation.settle(FEATURES, args, platform="cpu", given={"cp_comm_type"})
    assert args.context_parallel_algo == "ulysses_cp_algo"
    args = argparse.Namespace(**{**RUN, "cp_comm_type": ["a2a+p2p"]}, hierarchical_context_parallel_sizes=[2, 2])
    activation.settle(FEATURES, args, platform="cpu", given={"cp_comm_type"})
    assert (args.context_parallel_algo, args.ulysses_degree_in_cp) == ("hybrid_cp_algo", 2)


ROPE = "--position-embedding-type rope --group-query-attention --num-query-groups 2"
TWO = {
    "ring": f"{ROPE} --context-parallel-kv-cache-policy full",
    "ulysses": f"{ROPE} --context-parallel-algo ulysses_cp_algo --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "gather": f"{ROPE} --context-parallel-algo kvallgather_cp_algo --recompute-granularity selective",
    "learned-positions": "--use-distributed-optimizer",
}


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_one(name):
    flags = TWO[name]
    assert_same_training(
        " ".join(word for word in ROPE.split() if ROPE in flags),
        f"{flags} --context-parallel-size 2",
        world_b=2,
        features=["flash-attention"],
    )


FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@ranks(2, megatron=True)
@pytest.mark.parametrize("algorithm", ["megatron_cp_algo", "ulysses_cp_algo"])
def test_recomputation_is_bit_equal(world, algorithm):
    """Dropout of attention included: the seed comes again, and with it the mask."""
    flags = f"{TINY} {ROPE} --context-parallel-size 2 --context-parallel-algo {algorithm} --attention-dropout 0.2"
    plain = train(flags)
    for recompute in (FULL_RECOMPUTE, "--recompute-granularity selective"):
        again = train(f"{flags} {recompute}")
        assert (again.curve, again.digest) == (plain.curve, plain.digest)
    assert train(flags.replace("dropout 0.2", "dropout 0.1")).digest != plain.digest


FOUR = {
    "double ring": "--context-parallel-size 4 --cp-window-size 2 --use-cp-send-recv-overlap",
    "hybrid": "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
    "tensor": "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--context-parallel-size 2 --pipeline-model-parallel-size 2",
    "data": "--context-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce",
}


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_as_one(name):
    assert_same_training(ROPE, f"{ROPE} {FOUR[name]}", world_b=4, features=["flash-attention"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["", "--cp-window-size 2"])
def test_twenty_steps_of_four_ranks(layout):
    flags = f"{ROPE} --context-parallel-size 4 {layout}"
    assert_same_training(ROPE, flags, world_b=4, steps=20, features=["context-parallel"])


def test_two_ranks_in_bf16_are_as_close_as_its_rounding():
    flags = f"{ROPE} --bf16"
    assert_same_training(
        f"{flags} --use-flash-attn", f"{flags} --context-parallel-size 2", world_b=2, rtol=5e-3, weight_atol=5e-3
    )


def test_experts_beside_context_parallelism():
    experts = f"{ROPE} --num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --disable-bias-linear"
    assert_same_training(experts, f"{experts} --context-parallel-size 2", world_b=2, features=["context-parallel"])


def test_layers_are_counted_over_the_whole_model():
    """On a pipeline stage the host numbers attention from 1; the cache interval counts from the first stage."""
    run = run_of(
        **plan_arguments("megatron_cp_algo", 2, context_parallel_kv_cache_policy="full", context_parallel_cache_interval=1)
    )
    object.__setattr__(run, "layer_offset", lambda config: config.before)
    module = SimpleNamespace(attn_mask_type=SimpleNamespace(name="causal"), attention_type="self")
    given = SimpleNamespace(context_parallel_size=2, before=3)

    def original(module, config, layer_number):
        assert config.context_parallel_size == 1 and config is not given
        module.layer_number = layer_number

    run._build(original, module, given, 2)
    assert (module.layer_number, module.global_layer_number, module.config) == (2, 5, given)
    assert run.attention.maker.plan.caches(5) and not run.attention.maker.plan.caches(2)


def test_dtype_of_statistics_is_wide():
    from mindspeed.core.attention.contract import statistics_dtype

    assert statistics_dtype(torch.bfloat16) == torch.float32 and statistics_dtype(torch.float64) == torch.float64
