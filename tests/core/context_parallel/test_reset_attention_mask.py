"""Documents in packed samples: fused and split attention train as the host does with its dense masks."""

import argparse
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mindspeed.core.context_parallel.documents import equal_documents
from mindspeed.core.context_parallel.reset_attention_mask import ResetAttentionMask, ResetAttentionMaskFlags
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import set_attention_mask
from mindspeed.errors import ConfigError
from mindspeed.patching.activation import check
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


@pytest.fixture(scope="module")
def alone(reference):
    """Learned positions with one of the two resets only: the host's own curves."""
    flags, both = reference["learned_absolute"]
    one = {flag: flags.replace(RESET, flag) for flag in ("--reset-attention-mask", "--reset-position-ids")}
    curves = {flag: (words, train(words).curve) for flag, words in one.items()}
    assert len({tuple(both), *(tuple(curve) for _, curve in curves.values())}) == 3
    return curves


@ranks(2, megatron=True)
@pytest.mark.parametrize("algorithm", ["megatron_cp_algo", "ulysses_cp_algo"])
@pytest.mark.parametrize("flag", ["--reset-attention-mask", "--reset-position-ids"])
def test_each_reset_alone(world, flag, algorithm, alone):
    flags, expected = alone[flag]
    curve = train(f"{flags} --context-parallel-size 2 --context-parallel-algo {algorithm}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)


GRID = {
    "ring": "",
    "general": "--attention-mask-type general",
    "double": "--cp-window-size 2",
    "double general": "--cp-window-size 2 --attention-mask-type general",
    "ulysses": "--context-parallel-algo ulysses_cp_algo",
    "hybrid": "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
    "hybrid general": "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2 --attention-mask-type general",
}
RECOMPUTE = {
    "none": "",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
}


@pytest.mark.slow
@ranks(4, megatron=True)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", GRID)
def test_grid_of_samples_in_pairs(world, name, recompute, reference):
    flags, expected = reference["pairs"]
    curve = train(f"{flags} --context-parallel-size 4 {GRID[name]} {RECOMPUTE[recompute]}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)


@pytest.fixture(scope="module")
def equal_parts(reference):
    """Training with a mask that keeps 24 tokens together, set by the program: flags, size, curve."""
    flags, size = f"{reference['rope'][0].replace(RESET, '--eod-mask-loss')} --use-flash-attn", 24
    document = torch.arange(128) // size
    set_attention_mask((document[:, None] != document) | torch.ones(128, 128, dtype=torch.bool).triu(1))
    try:
        curve = train(flags).curve
    finally:
        set_attention_mask(None)
    return flags, size, curve


def test_documents_of_one_size_train_as_with_their_mask(equal_parts):
    flags, size, expected = equal_parts
    documents = f"{flags} --reset-attention-mask --fix-sub-seq-length {size}"
    assert_same_digits(train(documents).curve, expected)
    by_tokens = train(f"{flags} --reset-attention-mask").curve
    assert by_tokens != expected


@ranks(2, megatron=True)
@pytest.mark.parametrize("layout", ["--context-parallel-size 2", "--pipeline-model-parallel-size 2"])
def test_documents_of_one_size_on_two_ranks(world, layout, equal_parts):
    flags, size, expected = equal_parts
    curve = train(f"{flags} {layout} --reset-attention-mask --reset-position-ids --fix-sub-seq-length {size}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)  # rotary positions are relative: restarting them changes nothing


def test_a_mask_beside_documents_is_refused():
    run = argparse.Namespace(**FUSED)
    assert check((ResetAttentionMask(),), run, platform="cpu")
    set_attention_mask(torch.zeros(4, 4, dtype=torch.bool))
    try:
        with pytest.raises(ConfigError, match="--reset-attention-mask: a mask is set with set_attention_mask too. Pick one"):
            check((ResetAttentionMask(),), run, platform="cpu")
    finally:
        set_attention_mask(None)


FUSED = dict(reset_attention_mask=True, use_flash_attn=True, seq_length=128, create_attention_mask_in_dataloader=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(fix_sub_seq_length=-1), "--fix-sub-seq-length -1: must be at least 0"),
        (dict(fix_sub_seq_length=129), "--fix-sub-seq-length 129: must not exceed --seq-length 128. Use 1 to 128"),
        (dict(fix_sub_seq_length=8, reset_attention_mask=False), "--fix-sub-seq-length 8: needs --reset-attention-mask"),
        (dict(fix_sub_seq_length=8, use_flash_attn=False), "--fix-sub-seq-length 8: needs flash attention"),
        (dict(use_flash_attn=False), "--reset-attention-mask: needs flash attention, or masks from the data set"),
        *[
            (
                dict(use_flash_attn=False, create_attention_mask_in_dataloader=True, **pipeline),
                "chunk is neither first nor last",
            )
            for pipeline in (
                dict(pipeline_model_parallel_size=3),
                dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
                dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1, num_layers=4),
            )
        ],
        (
            dict(optimization_level=1),
            "--reset-attention-mask: needs flash attention, .* drops. Add --use-flash-attn at --optimization-level 2",
        ),
        (dict(fix_sub_seq_length=8, optimization_level=0), "--fix-sub-seq-length 8: needs --optimization-level 2 .given 0"),
        (dict(tokenizer_type="NullTokenizer"), "--reset-attention-mask: needs a tokenizer with an end-of-document token"),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        check((ResetAttentionMask(),), argparse.Namespace(**{**FUSED, **changes}), platform="cpu")


def test_sound_documents_are_accepted():
    for changes in ({}, dict(fix_sub_seq_length=8), dict(fix_sub_seq_length=128), dict(fix_sub_seq_length=7)):
        (active,) = check((ResetAttentionMask(),), argparse.Namespace(**{**FUSED, **changes}), platform="cpu")
        assert active.why == "--reset-attention-mask"
    dense = {**FUSED, "use_flash_attn": False, "create_attention_mask_in_dataloader": True}
    assert check((ResetAttentionMask(),), argparse.Namespace(**dense), platform="cpu")
    stages = dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2, num_layers=4)
    for masks in (dense, FUSED | stages | dict(num_layers=8), dense | stages):
        assert check((ResetAttentionMask(),), argparse.Namespace(**masks), platform="cpu")


def test_a_tokenizer_without_end_of_document_is_refused_when_it_is_built():
    class NoEnd:
        @property
        def eod(self):
            raise NotImplementedError("not implemented")

    (patch,) = ResetAttentionMask().patches(ResetAttentionMaskFlags(), None)
    assert patch.target == "training:build_tokenizer"
    for make in (NoEnd, partial(SimpleNamespace, eod=None), partial(SimpleNamespace, eod=-1), SimpleNamespace):
        with pytest.raises(ConfigError, match="--reset-attention-mask: needs a token that ends a document"):
            patch.value(make)
    assert patch.value(partial(SimpleNamespace, eod=0)).eod == 0
    assert list(ResetAttentionMask().patches(ResetAttentionMaskFlags(fix_sub_seq_length=4), None)) == []


def test_documents_of_one_size():
    tokens = torch.zeros(2, 10, dtype=torch.long)
    assert equal_documents(tokens, 4) == ((0, 4, 8, 10),) * 2
    assert equal_documents(tokens, 5) == ((0, 5, 10),) * 2 and equal_documents(tokens, 10) == ((0, 10),) * 2
