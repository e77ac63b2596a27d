import argparse
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed.core.memory.recompute_layers_per_pp_rank import (
    EnableRecomputeLayersPerPpRank,
    PerRankFlags,
    layers_of_chunk,
)
from mindspeed.patching import RunShape

ON = PerRankFlags(enable_recompute_layers_per_pp_rank=True)


@given(per_rank=st.integers(0, 24), chunks=st.integers(1, 4), layers=st.integers(1, 8))
def test_counts_are_those_of_the_position_rule(per_rank, chunks, layers):
    for chunk in range(chunks):
        chosen = [layer for layer in range(layers) if layer * chunks + chunk < per_rank]
        assert chosen == list(range(min(layers, layers_of_chunk(per_rank, chunk, chunks))))


@pytest.mark.parametrize(("count", "per_chunk"), [(0, [0, 0]), (2, [1, 1]), (3, [2, 1]), (4, [2, 2])])
def test_example_of_the_documentation(count, per_chunk):
    assert [layers_of_chunk(count, chunk, 2) for chunk in range(2)] == per_chunk


def problems(**args):
    run = {"num_layers": 8, "pipeline_model_parallel_size": 2, "recompute_granularity": "full", "recompute_method": "block"}
    shape = RunShape(argparse.Namespace(**{**run, **args}), "cpu")
    return [str(problem) for problem in EnableRecomputeLayersPerPpRank().check(ON, shape)]


def test_rules():
    assert problems(recompute_num_layers=4) == []
    (message,) = problems(recompute_method="uniform", recompute_num_layers=1)
    assert "--recompute-method block (given uniform)" in message
    (message,) = problems(recompute_granularity=None, recompute_method=None)
    assert "given none" in message
    (message,) = problems(recompute_num_layers=5)
    assert message.startswith("--recompute-num-layers 5: a pipeline rank has 4 layers")
    assert problems(recompute_num_layers=5, decoder_first_pipeline_num_layers=6) == []


@pytest.mark.parametrize(("chunk", "chunks", "seen"), [(0, 2, 2), (1, 2, 1), (None, None, 3)])
def test_host_compares_with_the_chunk_s_own_count_and_keeps_its_config(chunk, chunks, seen):
    answers = {"get_virtual_pipeline_model_parallel_rank": chunk, "get_virtual_pipeline_model_parallel_world_size": chunks}
    host = SimpleNamespace(load=lambda target: lambda: answers[target.partition(":")[2]])
    (patch,) = EnableRecomputeLayersPerPpRank().patches(ON, host)
    config = SimpleNamespace(recompute_num_layers=3)
    block = SimpleNamespace(config=config)
    counts = []

    def original(block, hidden):
        counts.append(block.config.recompute_num_layers)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        patch.value(original, block, "hidden")
    assert counts == [seen]
    assert block.config is config and config.recompute_num_layers == 3
