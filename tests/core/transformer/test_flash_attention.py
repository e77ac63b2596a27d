"""Flash attention: bands, mask modes, which mask applies, and no tensor of all scores."""

import argparse
import logging
from types import SimpleNamespace

import pytest
import torch

from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.transformer.flash_attention.feature import FlashAttention, FlashFlags
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import set_attention_mask
from mindspeed.core.transformer.flash_attention.wiring import Wiring
from mindspeed.errors import ConfigError
from mindspeed.notices import log_once, warn_once
from mindspeed.patching import activation
from mindspeed.testing import ranks
from mindspeed.testing.parity import assert_same_training
from tests.core.context_parallel.dense import assert_parity
from tests.core.transformer.attention_of_a_run import (
    HYBRID,
    RING,
    ULYSSES,
    LargestTensor,
    attention_of,
    layer,
    plan_arguments,
    run_of,
)

S = 200
BANDS = [(0, 0), (7, 0), (64, 3), (10, -2)]


@pytest.fixture(autouse=True)
def no_mask():
    yield
    set_attention_mask(None)


def assert_bands(algorithm, world):
    """Mode 4 is the band alone, mode 0 cuts the layer's causal rule by it."""
    for past, future in BANDS:
        for mode, visible_future in ((4, future), (0, min(0, future))):
            flags = FlashFlags(pre_tockens=past, next_tockens=future, sparse_mode=mode)
            arguments = plan_arguments(algorithm, world.size)
            run = run_of(flags, group=world.group, given={"pre_tockens", "next_tockens"}, **arguments)
            layout = run.attention.maker.plan.layout(S, past=past, future=visible_future)
            assert_parity(attention_of(run), layout, world.rank, dim=4, batch=1)
            run.groups.drop()


def test_bands_on_one_device():
    assert_bands(RING, SimpleNamespace(size=1, rank=0, group=None))


@ranks(2)
def test_bands_on_two_ranks(world):
    for algorithm in (RING, ULYSSES):
        assert_bands(algorithm, world)


@ranks(4)
def test_bands_on_four_ranks(world):
    for algorithm in (RING, ULYSSES, HYBRID):
        assert_bands(algorithm, world)


@pytest.mark.parametrize("mode", [0, 2, 3])
def test_plain_modes_are_causal(mode):
    run = run_of(FlashFlags(sparse_mode=mode))
    assert_parity(attention_of(run), SequenceLayout(37), 0)


def test_the_default_band_is_no_limit_but_a_given_one_counts():
    assert run_of().attention.maker.band.past is None
    assert run_of(given={"pre_tockens"}).attention.maker.band.past == 65536
    assert run_of(FlashFlags(sparse_mode=2, pre_tockens=3), given={"pre_tockens"}).attention.maker.band.past is None


def test_mode_one_needs_a_mask():
    run = run_of(FlashFlags(sparse_mode=1))
    inputs = [torch.randn(8, 1, 2, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="--sparse-mode 1 needs a mask: call set_attention_mask"):
        run.attention(layer(heads=2), *inputs, None)
    hidden = torch.rand(37, 37, generator=torch.Generator().manual_seed(0)) < 0.4
    set_attention_mask(hidden)
    assert_parity(attention_of(run), SequenceLayout(37, custom_mask=hidden), 0)


def check(given=(), **arguments):
    args = argparse.Namespace(**{"use_flash_attn": True, "optimization_level": 2, **arguments})
    activation.check((FlashAttention(),), args, platform="cpu", given={*given, *arguments})


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_band_beside_a_mode_without_one_is_named(caplog, mode):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mindspeed"):
        check(sparse_mode=mode, pre_tockens=7)
    assert f"--pre-tockens ignored: --sparse-mode {mode} has no band" in caplog.text


def test_another_attention_backend_is_named(caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mindspeed"):
        check(attention_backend=SimpleNamespace(name="auto"))
        assert caplog.text == ""
        check(attention_backend=SimpleNamespace(name="unfused"))
    assert "--attention-backend unfused is ignored" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparse_mode": 5}, "--sparse-mode 5: 5 to 8 are internal modes"),
        ({"sparse_mode": 4, "pre_tockens": 2, "next_tockens": -3}, "Use --pre-tockens 3 or more"),
        ({"sparse_mode": 4, "window_size": (3, 0)}, "window_size"),
        ({"transformer_impl": "transformer_engine"}, "--transformer-impl"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        check(**arguments)


def test_transformer_engine_is_refused_only_where_it_can_be_meant(monkeypatch):
    """The default of programs and hosts names it, which means nothing where it is not installed."""
    args = argparse.Namespace(use_flash_attn=True, transformer_impl="transformer_engine")
    activation.check((FlashAttention(),), args, platform="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for platform in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match="--transformer-impl transformer_engine: has its own attention"):
            activation.check((FlashAttention(),), args, platform=platform)


def test_a_tensor_is_used_as_it_is_and_checked():
    run, hidden = run_of(), torch.rand(1, 1, 37, 37, generator=torch.Generator().manual_seed(1)) < 0.4
    layout = SequenceLayout(37, custom_mask=hidden)
    for kind in ("padding", "causal", "no_mask"):
        assert_parity(attention_of(run, layer(kind), mask=hidden), layout, 0)
    inputs = [torch.randn(8, 1, 4, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=r"attention_mask: expected \[8, 8\] or .* got \(1, 1, 4, 4\)"):
        run.attention(layer(), *inputs, torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected a bool tensor"):
        run.attention(layer(), *inputs, torch.zeros(8, 8))


def test_layer_scaling_cancels_and_an_explicit_scale_is_kept():
    # the host's constructor has divided by the layer number already
    scaled = layer(scale=0.3 / 5, number=5, apply_query_key_layer_scaling=True)
    assert_parity(attention_of(run_of(), scaled), SequenceLayout(20), 0, scale=0.3)
    assert_parity(attention_of(run_of(), layer(scale=0.07)), SequenceLayout(20), 0, scale=0.07)


def test_unequal_lengths_are_the_hosts_on_one_device_only():
    run, seen = run_of(), []
    step_aside = Wiring._forward
    query, key = torch.randn(1, 1, 4, 4), torch.randn(8, 1, 4, 4)
    log_once.cache_clear()
    assert step_aside(run, lambda *args: seen.append(args) or "host", layer(), query, key, key, None) == "host"
    assert seen[0][1] is query and seen[0][2] is key
    wide = run_of(**plan_arguments(RING, 2))
    with pytest.raises(ValueError, match="1 queries and 8 keys; cross attention is not supported"):
        wide._forward(None, layer(), query, key, key, None)


@pytest.mark.counted
@pytest.mark.parametrize(
    ("arguments", "flags", "share"),
    [
        ({}, FlashFlags(), 300),
        ({}, FlashFlags(pre_tockens=500), 10),
        ({"position_embedding_type": "alibi", "alibi_fusion_attn_type": 2}, FlashFlags(), 5),
    ],
    ids=["causal", "band", "alibi"],
)
def test_nothing_grows_with_the_square_of_the_sequence(arguments, flags, share):
    length = 3000
    run = run_of(flags, **arguments)
    inputs = [torch.randn(length, 1, 1, 8, requires_grad=True) for _ in range(3)]
    with LargestTensor() as largest:
        run.attention(layer(heads=1), *inputs, None).sum().backward()
    assert 0 < largest.elements <= length * length // share


@pytest.mark.counted
def test_work_grows_with_the_band_not_with_the_sequence():
    def visited(length, past):
        layout = SequenceLayout(length, ring=2, past=past)
        return sum(tile.area for row in range(2) for column in range(2) for tile in layout.tiles(row, column))

    assert visited(4096, 64) < 4096 * 4096 / 2
    exact = [sum(min(row, 64) + 1 for row in range(length)) for length in (1024, 4096)]
    from mindspeed.core.context_parallel.tiles import visible_entries

    for length, area in zip((1024, 4096), exact, strict=True):
        layout = SequenceLayout(length, ring=2, past=64)
        assert sum(visible_entries(layout.tiles(row, column)) for row in range(2) for column in range(2)) == area


def test_fused_training_equals_the_hosts():
    assert_same_training(
        "",
        "--use-flash-attn",
        features=["flash-attention"],
        called=["megatron.core.transformer.dot_product_attention:DotProductAttention.forward"],
    )


def test_bf16_training_is_close():
    first, second = assert_same_training(
        "--bf16", "--bf16 --use-flash-attn", rtol=1e-2, weight_atol=1e-2, features=["flash-attention"]
    )
    assert first.losses != second.losses
