import argparse
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindspeed.core.pipeline_parallel.noop_layers import (
    NoopFlags,
    NoopLayer,
    NoopLayers,
    NoopSpec,
    _flops_of_real,
    _mean_over_real,
    _place_real_layer,
    moe_pattern,
    parse_positions,
    real_positions,
    with_gaps,
)
from mindspeed.patching import RunShape


@pytest.mark.parametrize(
    ("text", "positions"),
    [("0", {0}), ("0,7", {0, 7}), (" 3 , 1 - 2,3", {1, 2, 3}), ("120-122", {120, 121, 122}), ("5-5", {5})],
)
def test_positions_are_read(text, positions):
    assert parse_positions(text) == positions


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1-", "4-2", "1.5", "1--2"])
def test_unreadable_positions_are_named(text):
    with pytest.raises(ValueError, match="neither a position nor a range|falls"):
        parse_positions(text)


@given(st.sets(st.integers(0, 11)))
def test_real_positions_are_numbered_without_gaps(empty):
    real = real_positions(12, empty)
    assert sorted([*real, *empty]) == list(range(12))
    assert real == sorted(real)


def problems(text, num_layers=4):
    run = RunShape(argparse.Namespace(num_layers=num_layers), "cpu")
    return [str(problem) for problem in NoopLayers().check(NoopFlags(noop_layers=text), run)]


@pytest.mark.parametrize(
    ("text", "words"),
    [("x", "'x' is neither"), ("1,4,9", "4, 9 is outside --num-layers 4"), ("0-3", "leaves none of --num-layers 4 to train")],
)
def test_bad_lists_are_refused_with_numbers(text, words):
    (message,) = problems(text)
    assert message.startswith(f"--noop-layers {text}") and words in message


def test_good_list_is_accepted():
    assert problems("0,3") == []


def test_only_a_chunk_without_layers_copies():
    mixed = with_gaps(["a", "b", "c"], 4, frozenset({4, 6}))
    assert mixed == [NoopSpec({"offset": 4, "copies": False}), "b", NoopSpec({"offset": 4, "copies": False})]
    hollow = with_gaps(["a", "b"], 0, frozenset({0, 1}))
    assert [spec.params["copies"] for spec in hollow] == [True, False]


def test_layer_hands_on_its_input_and_keeps_its_number():
    hidden, context = torch.randn(3, 2, 4, requires_grad=True), torch.ones(1)
    layer = NoopLayer(None, 2, offset=4)
    out, out_context = layer(hidden, attention_mask=None, context=context, rotary_pos_emb=None)
    assert out is hidden and out_context is context and layer.layer_number == 6
    assert list(layer.parameters()) == [] and layer.sharded_state_dict("x", (), None) == {}
    copied, _ = NoopLayer(None, 1, copies=True)(hidden)
    copied.sum().backward()
    assert copied.data_ptr() != hidden.data_ptr() and torch.equal(hidden.grad, torch.ones_like(hidden))


def run_args(**more):
    return argparse.Namespace(num_layers=6, num_experts=8, moe_layer_freq=2, **more)


def test_flops_count_layers_that_exist():
    seen = []

    def host_flops(args, batch_size):
        seen.append((args.num_layers, args.moe_layer_freq, batch_size))
        return 1.0

    args = run_args()
    # positions 0..5 are MoE at 0, 2, 4; without 2 and 3 the pattern is dense/MoE as those that stay
    assert _flops_of_real(frozenset({2, 3}))(host_flops, args, 16) == 1.0
    assert seen == [(4, [1, 0, 1, 0], 16)]
    assert args.num_layers == 6 and args.moe_layer_freq == 2


def test_moe_mean_is_over_moe_layers_that_exist():
    seen = {}

    def host_metrics(loss_scale, iteration, writer, num_layers=None, moe_layer_freq=None):
        seen.update(num_layers=num_layers, moe_layer_freq=moe_layer_freq)

    _mean_over_real(frozenset({1, 2}))(host_metrics, 1.0, 5, None, num_layers=6, moe_layer_freq=2)
    assert seen == {"num_layers": 6, "moe_layer_freq": [1, 0, 0, 0, 1, 0]}
    _mean_over_real(frozenset({1}))(host_metrics, 1.0, 5, None, num_layers=3)
    assert seen["moe_layer_freq"] == [1, 0, 1]


def test_pattern_of_a_frequency_and_of_a_list():
    assert moe_pattern(5, 2) == [1, 0, 1, 0, 1]
    assert moe_pattern(3, [1, 1, 0]) == [1, 1, 0]


def test_layers_are_saved_on_an_axis_without_gaps():
    layer = SimpleNamespace(config=SimpleNamespace(num_layers=6), layer_number=5)

    def host_state(layer, prefix, sharded_offsets, metadata):
        return sharded_offsets

    place = _place_real_layer(frozenset({0, 2}))
    assert place(host_state, layer, "p.", [(0, 4, 6)], None) == [(0, 2, 4)]
    assert place(host_state, layer, "p.", [(0, 0, 1)], None) == [(0, 0, 1)]  # another stack's axis
    assert place(host_state, layer, "p.", (), None) == ()
