"""Documents in packed samples: fused and split attention train as the host does with its dense masks."""

import argparse

import numpy as np
import pytest
import torch

from mindspeed.core.context_parallel.reset_attention_mask import ResetAttentionMask
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import set_attention_mask
from mindspeed.patching import NoFlags, RunShape
from mindspeed.testing import ranks
from tests.training.runs import TINY, assert_same_digits, seed_checkpoint, train

DATA = "--tokenizer-type ByteTokenizer --vocab-size 257 --make-vocab-size-divisible-by 264 --split 100,0,0"
RESET = "--reset-attention-mask --reset-position-ids --eod-mask-loss"
SMALL = (
    TINY.replace("--mock-data --tokenizer-type NullTokenizer --vocab-size 8191", "")
    .replace("--no-create-attention-mask-in-dataloader", "")
    .replace("--seq-length 32 --max-position-embeddings 32", "--seq-length 128 --max-position-embeddings 128")
)


def write_documents(prefix):
    """Random documents of 1 to 60 tokens, each ending with the end-of-document token 256."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        length = int(torch.randint(0, 60, (), generator=generator))
        tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
        builder.add_document([*tokens, 256], [length + 1])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Common flags with a seed checkpoint, and the host's own curve for each kind of positions."""
    folder = tmp_path_factory.mktemp("documents")
    write_documents(folder / "corpus")
    common = f"{SMALL} {DATA} --data-path {folder / 'corpus'} --data-cache-path {folder / 'cache'} {RESET}"
    curves = {}
    for positions in ("learned_absolute", "rope"):
        flags = f"{common} --position-embedding-type {positions}"
        flags = f"{flags} {seed_checkpoint(folder / positions, flags)}"
        curves[positions] = (flags, train(flags).curve)
    pairs = f"{curves['rope'][0]} --micro-batch-size 2"  # the mean of losses depends on which samples share a micro batch
    curves["pairs"] = (pairs, train(pairs).curve)
    return curves


@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_fused_attention_trains_as_dense_masks_do(reference, positions):
    flags, expected = reference[positions]
    assert_same_digits(train(f"{flags} --use-flash-attn").curve, expected)


TWO = {
    "ring": "--context-parallel-size 2",
    "ring general": "--context-parallel-size 2 --attention-mask-type general",
    "ulysses": "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo",
    "gather": "--context-parallel-size 2 --context-parallel-algo kvallgather_cp_algo",
    "recompute": "--context-parallel-size 2 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "tensor": "--use-flash-attn --tensor-model-parallel-size 2 --make-vocab-size-divisible-by 132",
    "pipeline": "--use-flash-attn --pipeline-model-parallel-size 2",
}


@ranks(2, megatron=True)
@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_dense_masks_do(world, name, reference):
    flags, expected = reference["rope"]
    curve = train(f"{flags} {TWO[name]}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)


@ranks(2, megatron=True)
@pytest.mark.parametrize("kind", ["learned_absolute", "pairs"])
def test_learned_positions_and_samples_with_other_documents(world, kind, reference):
    flags, expected = reference[kind]
    curve = train(f"{flags} --context-parallel-size 2").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)


@ranks(4, megatron=True)
@pytest.mark.parametrize(
    "layout",
    [
        "--context-parallel-size 4 --cp-window-size 2",
        "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
        "--use-flash-attn --pipeline-model-parallel-size 4",
        "--context-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ],
    ids=["double", "hybrid", "pipeline", "context-virtual-pipeline"],
)
def test_four_ranks_train_as_dense_masks_do(world, layout, reference):
    flags, expected = reference["rope"]
    curve = train(f"{flags} {layout}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)


def test_a_mask_beside_documents_is_refused():
    run = RunShape(argparse.Namespace(reset_attention_mask=True, use_flash_attn=True), "cpu")
    feature = ResetAttentionMask()
    assert feature.why(NoFlags(), run) == "--reset-attention-mask" and list(feature.check(NoFlags(), run)) == []
    set_attention_mask(torch.zeros(4, 4, dtype=torch.bool))
    try:
        (problem,) = feature.check(NoFlags(), run)
        assert "pick one" in problem.fix.lower()
    finally:
        set_attention_mask(None)
    off = RunShape(argparse.Namespace(reset_attention_mask=True, use_flash_attn=False), "cpu")
    assert feature.why(NoFlags(), off) == ""
