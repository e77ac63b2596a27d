"""Ways to train that must not change the numbers, or must change only what they say."""

from __future__ import annotations

import pytest

from mindspeed.testing import ranks
from tests.training.runs import TINY, assert_same_digits, train

DROPOUT = TINY.replace("--attention-dropout 0 --hidden-dropout 0", "--attention-dropout 0.1 --hidden-dropout 0.1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that others are compared with, and a cache of sample indices."""
    cache = f"--data-cache-path {tmp_path_factory.mktemp('cache')}"
    return cache, train(f"{DROPOUT} {cache}")


SAME_BITS = {
    "selective-recompute": "--recompute-granularity selective",
    "full-recompute-uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
    "full-recompute-block": "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
    "mask-from-the-loader": "",
    "loader-processes": "--num-workers 1",
    "manual-gc": "--manual-gc --manual-gc-interval 2",
    "timers": "--timing-log-level 2",
    "norms": "--log-params-norm --log-num-zeros-in-grad --log-throughput",
    "rerun-machine": "--rerun-mode validate_results",
}


@pytest.mark.parametrize("mode", SAME_BITS)
def test_same_bits(mode, plain):
    cache, expected = plain
    flags = DROPOUT.replace("--no-create-attention-mask-in-dataloader", "") if mode == "mask-from-the-loader" else DROPOUT
    run = train(f"{flags} {cache} {SAME_BITS[mode]}")
    assert run.digest == expected.digest


RUNS = {
    "bf16": "--bf16",
    "fp16": "--fp16 --initial-loss-scale 65536",
    "llama": "--swiglu --normalization RMSNorm --position-embedding-type rope --group-query-attention --num-query-groups 2 "
    "--untie-embeddings-and-output-weights --disable-bias-linear --qk-layernorm",
    "squared-relu": "--squared-relu",
    "multi-token-prediction": "--mtp-num-layers 1 --position-embedding-type rope",
    "experts": "--num-experts 4 --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --disable-bias-linear",
    "shared-experts": "--num-experts 4 --moe-shared-expert-intermediate-size 64 --moe-layer-freq [0,1,0,1] --disable-bias-linear "
    "--moe-token-dispatcher-type alltoall",
    "decoupled-lr": "--decoupled-lr 1e-4",
    "per-token-loss": "--calculate-per-token-loss",
    "sgd": "--optimizer sgd",
    "samples": "--train-samples 12 --rampup-batch-size 2 2 4",
}


@pytest.mark.parametrize("kind", RUNS)
def test_loss_is_that_of_a_fresh_model(kind, tmp_path):
    flags = TINY.replace("--train-iters 3", "") if kind == "samples" else TINY
    run = train(f"{flags} --data-cache-path {tmp_path} {RUNS[kind]} --tensorboard-dir {tmp_path}/tb")
    assert len(run.lines) >= 3
    assert all(8.5 < float(loss) < 9.6 for _, loss, _ in run.curve), run.curve
    assert all(line["nan"] == "0" for line in run.lines)
    if kind == "experts":
        assert "load_balancing_loss" in run.text and "z_loss" in run.text
    if kind == "multi-token-prediction":
        assert "mtp_1 loss" in run.text
    if kind == "samples":
        assert [line["batch"] for line in run.lines][:2] == ["2", "2"] and run.lines[-1]["batch"] == "4"


def test_fp16_overflow_skips_and_halves(tmp_path):
    run = train(f"{TINY} --data-cache-path {tmp_path} --fp16 --initial-loss-scale 1e30 --hysteresis 1")
    assert [line["skipped"] for line in run.lines] == ["1"] * 3
    assert [float(line["scale"]) for line in run.lines] == pytest.approx([1e30 / 2, 1e30 / 4, 1e30 / 8], rel=1e-6)
    assert all(line["loss"] is None for line in run.lines)


MOE = "--num-experts 4 --moe-token-dispatcher-type alltoall --disable-bias-linear --moe-router-topk 2 --save-interval 1"


@ranks(2, megatron=True)
def test_expert_parallel_ranks_print_the_digits_of_replicas(world):
    folder = world.shared_dir
    cache = f"--data-cache-path {folder}/cache"
    train(f"{TINY} {MOE} {cache} --train-iters 1 --lr 0 --min-lr 0 --save {folder}/seed")
    load = f"{cache} --load {folder}/seed --finetune --no-load-optim --no-load-rng"
    replicas = train(f"{TINY} {MOE} {load}").curve
    experts = train(f"{TINY} {MOE} {load} --expert-model-parallel-size 2").curve
    split = train(f"{TINY} {MOE} {load} --expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce").curve
    if world.rank == world.size - 1:
        assert_same_digits(experts, replicas)
        assert_same_digits(split, replicas)


@ranks(2, megatron=True)
def test_context_parallel_ranks_print_the_digits_of_one(world):
    """A feature of ours, by its flag alone: plain megatron-core refuses context parallelism without Transformer Engine."""
    folder = world.shared_dir
    cache = f"--data-cache-path {folder}/cache"
    train(f"{TINY} {cache} --train-iters 1 --lr 0 --min-lr 0 --save {folder}/seed --save-interval 1")
    load = f"{cache} --load {folder}/seed --finetune --no-load-optim --no-load-rng"
    replicas = train(f"{TINY} {load}").curve
    parallel = train(f"{TINY} {load} --context-parallel-size 2 --use-flash-attn").curve
    if world.rank == world.size - 1:
        assert_same_digits(parallel, replicas)
