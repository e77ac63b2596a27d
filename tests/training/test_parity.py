"""All layouts print the digits of one process, from one seed checkpoint."""

from __future__ import annotations

import pytest

from mindspeed.testing import ranks
from tests.training.runs import TINY, assert_same_digits, seed_checkpoint, train


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Flags that load the seed checkpoint, and the curve of one process."""
    folder = tmp_path_factory.mktemp("seed")
    load = seed_checkpoint(folder)
    return load, train(f"{TINY} {load}").curve


LAYOUTS = {
    "dp2": "",
    "dp2-overlap": "--overlap-grad-reduce --ddp-bucket-size 100000",
    "distributed-optimizer": "--use-distributed-optimizer",
    "distributed-overlaps": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 100000",
    "tp2": "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 64",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 64",
    "pp2": "--pipeline-model-parallel-size 2",
    "pp2-vpp": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
}


@ranks(2, megatron=True)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_ranks_print_the_digits_of_one(world, layout, reference):
    load, expected = reference
    curve = train(f"{TINY} {load} {LAYOUTS[layout]}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)


@ranks(4, megatron=True)
def test_four_ranks_print_the_digits_of_one(world, reference):
    load, expected = reference
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --make-vocab-size-divisible-by 64"
    curve = train(f"{TINY} {load} {layout}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)
