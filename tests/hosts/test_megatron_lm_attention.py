"""Megatron-LM's own script with documents in its samples: every layout trains as the host does with its dense masks; refusals."""

import math

import numpy as np
import pytest
import torch

from tests.hosts.launcher import IMPORT_LINE, tiny_gpt
from tests.hosts.test_megatron_lm_traps import refused

pytestmark = [pytest.mark.megatron_lm, pytest.mark.timeout(600)]
END = 8191  # what the NullTokenizer of `tiny_gpt` ends documents with
RESET = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
CP2 = {"context_parallel_size": 2}
CP4 = {"context_parallel_size": 4}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def documents(runs, matrix):
    """Flags with documents of 1 to 60 tokens in samples of 64, and the curve of the host's dense masks."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = runs.directory / "documents"
    generator = np.random.default_rng(11)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(400):
        length = int(generator.integers(0, 60))
        builder.add_document(torch.from_numpy(np.append(generator.integers(0, END, length), END)), [length + 1])
    builder.finalize(f"{prefix}.idx")
    start = {"load": matrix.seed(), "finetune": True, "no_load_optim": True, "no_load_rng": True}
    flags = {**start, **RESET, "iterations": 3}
    reference = runs(*tiny_gpt(prefix, **flags))
    assert reference.ok and len(reference.curve) == 3, reference.tail()
    return prefix, flags, reference.curve


def assert_equal_curves(run, reference):
    assert run.ok, run.tail()
    assert run.curve.keys() == reference.keys()
    for step, (loss, norm) in run.curve.items():
        assert math.isclose(float(loss), float(reference[step][0]), rel_tol=2.5e-7), (run.curve, reference)
        assert math.isclose(float(norm), float(reference[step][1]), abs_tol=1.01e-3), (run.curve, reference)


LAYOUTS = {
    "ring": (2, CP2),
    "stages": (2, {"use_flash_attn": True, "pipeline_model_parallel_size": 2}),
    "virtual stages": (4, {**CP2, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
}
MORE = {
    "one rank": (1, {"use_flash_attn": True}),
    "general": (2, {**CP2, "attention_mask_type": "general"}),
    "ulysses": (2, {**CP2, "context_parallel_algo": "ulysses_cp_algo"}),
    "gathered": (2, {**CP2, "context_parallel_algo": "kvallgather_cp_algo"}),
    "recompute": (2, {**CP2, **FULL}),
    "selective": (2, {**CP2, "recompute_granularity": "selective"}),
    "tensor": (2, {"use_flash_attn": True, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "double ring": (4, {**CP4, "cp_window_size": 2}),
    "hybrid": (4, {**CP4, "context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}),
    "four stages": (4, {"use_flash_attn": True, "pipeline_model_parallel_size": 4}),
    "ring and stages": (4, {**CP2, "pipeline_model_parallel_size": 2, **FULL}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents(runs, documents, name):
    prefix, flags, reference = documents
    world, changes = LAYOUTS[name]
    assert_equal_curves(runs(*tiny_gpt(prefix, **{**flags, **changes}), world=world), reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_documents_in_more_layouts(runs, documents, name):
    prefix, flags, reference = documents
    world, changes = MORE[name]
    assert_equal_curves(runs(*tiny_gpt(prefix, **{**flags, **changes}), world=world), reference)


def test_the_curves_tell_documents_from_none(runs, documents):
    """Without resets the same data give another curve, so that the comparisons above can fail."""
    prefix, flags, reference = documents
    run = runs(*tiny_gpt(prefix, **{**flags, "reset_attention_mask": False, "reset_position_ids": False}))
    assert run.ok and float(run.curve[2][0]) != float(reference[2][0])


def test_context_parallelism_is_refused_with_all_problems(runs, matrix):
    flags = {
        **CP4,
        "context_parallel_algo": "hybrid_cp_algo",
        "ulysses_degree_in_cp": 3,
        "use_ulysses_allgather_kv": True,
        "context_parallel_cache_interval": 1,
    }
    refused(
        runs(*tiny_gpt(matrix.corpus, **flags), world=4),
        "--ulysses-degree-in-cp 3: must divide --context-parallel-size 4",
        "--num-attention-heads 4: must be divisible by --ulysses-degree-in-cp 3 x --tensor-model-parallel-size 1",
        "--use-ulysses-allgather-kv: needs --context-parallel-algo ulysses_cp_algo (given hybrid_cp_algo)",
        "--context-parallel-cache-interval 1: needs a cache policy",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_length": 62}, "--seq-length 62: must be a multiple of 2 x --context-parallel-size = 4"),
        ({"optimization_level": 1}, "--context-parallel-size 2: needs --optimization-level 2 (given 1)"),
    ],
)
def test_what_the_host_asserts_is_told_with_our_numbers(runs, matrix, changes, words):
    refused(runs(*tiny_gpt(matrix.corpus, **CP2, **changes), world=2), words)


def test_an_assertion_of_the_host_alone_keeps_its_words(runs, matrix):
    run = runs(*tiny_gpt(matrix.corpus, train_samples=8))
    assert run.codes == [1] and "AssertionError: expected iteration-based training" in run.log, run.tail()


def test_a_tokenizer_without_end_of_document_is_refused(runs, matrix, tmp_path):
    """As one of Hugging Face's without such a token answers."""
    script = tmp_path / "pretrain_gpt.py"
    home = "megatron.training.tokenizer.tokenizer"
    lines = [f"from {home} import _NullTokenizer", "_NullTokenizer.eod = property(lambda self: None)"]
    script.write_text("\n".join([IMPORT_LINE, *lines, (runs.checkout / "pretrain_gpt.py").read_text()]))
    run = runs(*tiny_gpt(matrix.corpus, reset_attention_mask=True), script=script)
    refused(run, "--reset-attention-mask: needs a token that ends a document, which _NullTokenizer has not")


def test_flags_of_other_names_and_idle_ones(runs, matrix):
    flags = {
        "multi_head_latent_attention": True,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "kv_lora_rank": 16,
        "position_embedding_type": "rope",
        "cp_window_size": 2,
    }
    run = runs(*tiny_gpt(matrix.corpus, iterations=1, **flags))
    assert run.ok and len(run.curve) == 1, run.tail()
    assert "--qk-head-dim: 128 -> 16 because --qk-nope-head-dim means it" in run.log, run.tail()
    assert "--cp-window-size 2 has no effect because the feature context-parallel is off" in run.log
