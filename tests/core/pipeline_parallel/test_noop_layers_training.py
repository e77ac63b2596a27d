"""A model with empty slots trains as the model without them, in every layout, and shares its checkpoints."""

import pytest

from mindspeed.testing import ranks
from mindspeed.testing.parity import assert_same_training
from tests.training.runs import TINY, train

CALLED = ["megatron.core.transformer.transformer_block:TransformerBlock._build_layers"]
MOE = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 64 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
)


def same(compact, gaps, world=1, common=""):
    # weights are named by their layer without gaps, so both models start from the same ones
    assert_same_training(
        compact, gaps, world_b=world, rtol=0 if world == 1 else 1e-5, common=common, features=["noop-layers"], called=CALLED
    )


@pytest.mark.parametrize("gaps", ["--num-layers 6 --noop-layers 0,5", "--num-layers 7 --noop-layers 1-3"])
def test_one_process_bit_for_bit(gaps):
    layers = 4
    same(f"--num-layers {layers}", gaps)


def test_recomputation_counts_positions():
    full = "--recompute-granularity full --recompute-method block --recompute-num-layers 2"
    same("--num-layers 4", f"--num-layers 6 --noop-layers 0,3 {full}")


def test_experts_at_every_second_position():
    # positions 0, 2, 4 hold experts; without 1 and 4 the pattern is experts, experts, dense, dense
    same("--num-layers 4 --moe-layer-freq ([1,1,0,0])", "--num-layers 6 --noop-layers 1,4 --moe-layer-freq 2", common=MOE)


PIPELINES = {
    "two stages": "--num-layers 6 --noop-layers 0,5 --pipeline-model-parallel-size 2",
    "an empty stage": "--num-layers 8 --noop-layers 4-7 --pipeline-model-parallel-size 2",
    "virtual stages, one of them empty": "--num-layers 8 --noop-layers 0,1,6,7 --pipeline-model-parallel-size 2 "
    "--num-layers-per-virtual-pipeline-stage 2",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_two_stages(name):
    same("--num-layers 4", PIPELINES[name], world=2)


def test_four_stages():
    same("--num-layers 4", "--num-layers 8 --noop-layers 0,1,4,7 --pipeline-model-parallel-size 4", world=4)


@ranks(2, megatron=True)
def test_checkpoints_are_those_of_the_model_without_gaps(world):
    """Saved on two stages with gaps, loaded with other gaps, without, and resumed: the same curve each time."""
    flags = TINY.replace("--num-layers 4", "--lr-warmup-iters 0").replace("--train-iters 3", "--train-iters 4")
    pipeline = "--pipeline-model-parallel-size 2 --use-distributed-optimizer"
    gaps, folder = "--num-layers 6 --noop-layers 0,5", world.shared_dir / "checkpoints"
    whole = train(f"{flags} {gaps} {pipeline} --save {folder} --save-interval 2").curve
    # what was saved at step 2 goes on alike, whatever the gaps
    for layers in (gaps, "--num-layers 8 --noop-layers 1,2,3,4", "--num-layers 4"):
        resumed = train(f"{flags} {layers} {pipeline} --load {folder} --ckpt-step 2 --no-load-rng").curve
        if world.rank == world.size - 1:
            assert resumed == whole[2:]
