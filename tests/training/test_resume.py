"""A run that is interrupted and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import pytest

from mindspeed.testing import ranks
from tests.training.runs import TINY, train

DROPOUT = TINY.replace("--attention-dropout 0 --hidden-dropout 0", "--attention-dropout 0.1 --hidden-dropout 0.1")
EVALUATED = DROPOUT.replace("--eval-iters 0", "--eval-iters 1") + " --eval-interval 2"

ONE_RANK = {
    "torch-dist": DROPOUT,
    "torch": f"{DROPOUT} --ckpt-format torch",
    "async": f"{DROPOUT} --async-save",
    "evaluation-between": EVALUATED,
    "cyclic": f"{DROPOUT} --dataloader-type cyclic",
    "loader-processes": DROPOUT.replace("--num-workers 0", "--num-workers 1"),
    "fp16": f"{DROPOUT} --fp16 --initial-loss-scale 65536 --loss-scale-window 1",
    "bf16": f"{DROPOUT} --bf16 --ckpt-format torch",
    "mixture": f"{DROPOUT} --num-experts 4 --moe-token-dispatcher-type alltoall --disable-bias-linear",
    "ramp": DROPOUT.replace("--train-iters 4", "") + " --rampup-batch-size 2 2 4 --train-samples 14",
}


def resumed_like_uninterrupted(flags: str, folder, at: int = 2) -> None:
    """Train to the end; train to step `at` and from there; compare lines and weights of this rank."""
    # --train-iters stays the same: the schedule depends on it
    cache = f"--data-cache-path {folder}/cache"
    whole = train(f"{flags} {cache}")
    saving = f"--save {folder}/ckpt --save-interval 100"
    first = train(f"{flags} {cache} {saving} --exit-interval {at}")
    assert first.iteration == at
    second = train(f"{flags} {cache} {saving} --load {folder}/ckpt")
    assert second.iteration == whole.iteration > at
    assert first.timeless + second.timeless == whole.timeless
    assert second.digest == whole.digest
    assert first.digest != whole.digest


FOUR = " --train-iters 4"


@pytest.mark.parametrize("case", ONE_RANK)
def test_one_rank(case, tmp_path):
    flags = ONE_RANK[case]
    resumed_like_uninterrupted(flags.replace("--train-iters 3", "") if case == "ramp" else flags + FOUR, tmp_path)


def test_before_the_first_update(tmp_path):
    """The loss scale starts so high that no step has changed a weight when the checkpoint is written."""
    flags = f"{DROPOUT} {FOUR} --fp16 --initial-loss-scale 1e30 --data-cache-path {tmp_path}/cache"
    whole = train(flags)
    saving = f"--save {tmp_path}/ckpt --save-interval 100"
    first = train(f"{flags} {saving} --exit-interval 2")
    second = train(f"{flags} {saving} --load {tmp_path}/ckpt")
    assert first.timeless + second.timeless == whole.timeless
    assert [line["skipped"] for line in second.lines] == ["1", "1"]


TWO_RANKS = {
    "distributed-overlaps": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 100000",
    "distributed-torch": "--use-distributed-optimizer --ckpt-format torch",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel --ckpt-format torch",
    "pp2-vpp": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "ep2": "--num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --disable-bias-linear",
}


@ranks(2, megatron=True)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks(world, layout):
    resumed_like_uninterrupted(f"{DROPOUT} {FOUR} {TWO_RANKS[layout]}", world.shared_dir)


@ranks(4, megatron=True)
def test_four_ranks(world):
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer"
    resumed_like_uninterrupted(f"{DROPOUT} {FOUR} {layout}", world.shared_dir)
