"""A checkpoint of another shape is refused with every differing dimension."""

from __future__ import annotations

import pytest

from mindspeed.checkpoint import check_fits, optimizer_problems, shape_problems
from mindspeed.errors import CheckpointError

RUN = {
    "num_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "padded_vocab_size": 512,
    "tensor_model_parallel_size": 2,
    "max_position_embeddings": 128,
    "position_embedding_type": "rope",
    "add_bias_linear": True,
    "use_distributed_optimizer": True,
    "optimizer": "adam",
}


def flags(problems):
    return [(problem.flag, problem.value) for problem in problems]


def test_equal_arguments_fit():
    check_fits(RUN, dict(RUN))


def test_every_difference_is_named_at_once():
    saved = {**RUN, "num_layers": 4, "hidden_size": 32, "add_bias_linear": False}
    with pytest.raises(CheckpointError, match="of another shape") as caught:
        check_fits(saved, RUN, directory="/x")
    text = str(caught.value)
    assert "--num-layers 6: the checkpoint was saved with 4" in text
    assert "--hidden-size 64: the checkpoint was saved with 32" in text
    assert "--disable-bias-linear" in text
    assert "/x" in text


def test_layout_matters_to_the_torch_format_only():
    saved = {**RUN, "tensor_model_parallel_size": 1, "padded_vocab_size": 256}
    expected = [("--padded-vocab-size", 512), ("--tensor-model-parallel-size", 2)]
    assert flags(shape_problems(saved, RUN, format="torch")) == expected
    assert flags(shape_problems(saved, RUN, format="torch_dist")) == []


def test_positions_may_grow_where_they_are_not_learned():
    assert flags(shape_problems({**RUN, "max_position_embeddings": 64}, RUN)) == []
    learned = {**RUN, "max_position_embeddings": 64, "position_embedding_type": "learned_absolute"}
    assert ("--max-position-embeddings", 128) in flags(shape_problems(learned, RUN))


def test_names_of_other_versions_are_not_compared():
    assert flags(shape_problems({"num_layers": 6, "something_old": 1}, {**RUN, "something_new": 2})) == []


def test_sizes_of_what_is_not_used_are_not_compared():
    saved = {**RUN, "num_query_groups": 1, "q_lora_rank": 8}
    unused = {**RUN, "num_query_groups": 2, "q_lora_rank": 16, "group_query_attention": False}
    assert flags(shape_problems(saved, unused)) == []
    assert flags(shape_problems(saved, {**unused, "group_query_attention": True})) == [("--num-query-groups", 2)]


@pytest.mark.parametrize(("was", "now", "word"), [(True, False, "with"), (False, True, "without")])
def test_optimizer_kind(was, now, word):
    (problem,) = optimizer_problems({**RUN, "use_distributed_optimizer": was}, {**RUN, "use_distributed_optimizer": now})
    assert f"was saved {word} --use-distributed-optimizer" in str(problem)
    assert "--no-load-optim" in str(problem)
    with pytest.raises(CheckpointError, match="another optimizer"):
        check_fits({**RUN, "use_distributed_optimizer": was}, {**RUN, "use_distributed_optimizer": now})


@pytest.mark.parametrize("ignored", [{"finetune": True}, {"no_load_optim": True}])
def test_optimizer_kind_is_free_when_it_is_not_loaded(ignored):
    assert flags(optimizer_problems({**RUN, "use_distributed_optimizer": False, "optimizer": "sgd"}, {**RUN, **ignored})) == []
    assert flags(optimizer_problems({**RUN, "no_save_optim": True, "optimizer": "sgd"}, RUN)) == []


def test_optimizer_name():
    assert flags(optimizer_problems({**RUN, "optimizer": "sgd"}, RUN)) == [("--optimizer", "adam")]
