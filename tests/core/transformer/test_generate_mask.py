"""The one attention mask of a process: its calls, and that every algorithm, stage and recomputation sees the right one."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mindspeed
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import (
    STORE,
    generate_attention_mask,
    get_attention_mask,
    set_attention_mask,
)
from mindspeed.core.transformer.flash_attention.wiring import _scoped
from mindspeed.errors import ConfigError
from mindspeed.model import transformer as documented
from mindspeed.runtime import enabled
from mindspeed.testing import ranks
from mindspeed.training import data
from tests.core.context_parallel.dense import assert_parity, dense, draw
from tests.core.transformer.attention_of_a_run import (
    ADAPTIVE,
    HYBRID,
    RING,
    ULYSSES,
    attention_of,
    layer,
    plan_arguments,
    run_of,
)
from tests.training.runs import TINY, assert_same_digits, seed_checkpoint, train

S = 48


@pytest.fixture(autouse=True)
def no_mask():
    STORE.end_run()
    yield
    STORE.end_run()


def masks():
    """Random, prefix, and block-diagonal."""
    generator = torch.Generator().manual_seed(3)
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    prefix = future.clone()
    prefix[:, :17] = False
    block = torch.arange(S) // 20
    return {
        "random": torch.rand(2, 1, S, S, generator=generator) < 0.3,
        "prefix": prefix,
        "blocks": block[:, None] != block[None, :],
    }


def test_both_documented_homes_share_one_state():
    """Row 6 of the defects."""
    assert documented.set_attention_mask is set_attention_mask and documented.get_attention_mask is get_attention_mask
    assert documented.generate_attention_mask is generate_attention_mask
    hidden = masks()["prefix"]
    documented.set_attention_mask(hidden)
    assert get_attention_mask() is hidden
    documented.set_attention_mask(None)
    assert get_attention_mask(causal=False) is None


def test_generated_masks_never_count_as_custom():
    made = generate_attention_mask(True, "cpu")
    assert made.shape == (2048, 2048) and get_attention_mask(device="cpu") is made and not STORE.is_set
    args = argparse.Namespace(seq_length=6, micro_batch_size=2, pre_tockens=2, next_tockens=1, use_flash_attn=True)
    band = generate_attention_mask(args, False, "cpu")
    assert band.logical_not().sum(1).tolist() == [2, 3, 4, 4, 4, 3]
    args.use_flash_attn = False
    assert generate_attention_mask(args, False, "cpu").shape == (2, 1, 6, 6)
    with pytest.raises(ValueError, match="compress=False needs args with seq_length"):
        generate_attention_mask(False, "cpu")
    assert_parity(attention_of(run_of()), SequenceLayout(S), 0)


@pytest.mark.parametrize(
    ("mask", "kind", "words"),
    [
        (torch.zeros(4, 4), TypeError, "expected a bool tensor"),
        ([[True]], TypeError, "expected tiles of dtype bool"),
        (torch.zeros(4, 5, dtype=torch.bool), ValueError, r"got \(4, 5\)"),
        (torch.zeros(4, 2, 4, 4, dtype=torch.bool), ValueError, r"got \(4, 2, 4, 4\)"),
        ([torch.zeros(2, 3, dtype=torch.bool)], ValueError, r"square tiles .* got \(2, 3\)"),
    ],
)
def test_wrong_masks_are_refused(mask, kind, words):
    with pytest.raises(kind, match=words):
        set_attention_mask(mask)
    assert not STORE.is_set


def test_a_mask_of_another_length_or_batch_is_refused_when_it_is_used():
    run, inputs = run_of(), [torch.randn(8, 3, 4, 4) for _ in range(3)]
    for mask in (torch.zeros(9, 9, dtype=torch.bool), torch.zeros(2, 1, 8, 8, dtype=torch.bool)):
        set_attention_mask(mask)
        with pytest.raises(ValueError, match=r"set_attention_mask: expected \[8, 8\] or \[1 or 3, 1, 8, 8\]"):
            run.attention(layer(), *inputs, None)


def test_on_one_device():
    for hidden in masks().values():
        set_attention_mask(hidden)
        assert_parity(attention_of(run_of()), SequenceLayout(S, custom_mask=hidden), 0)


def assert_masks(world, algorithm, mask_type="general", **more):
    run = run_of(group=world.group, **plan_arguments(algorithm, world.size, attention_mask_type=mask_type), **more)
    for hidden in masks().values():
        if algorithm == ADAPTIVE and hidden.dim() == 4:
            continue  # one mask for all samples
        set_attention_mask(hidden)
        layout = run.attention.maker.layout(S)
        assert_parity(attention_of(run, layout=layout), layout, world.rank)
    STORE.clear()  # ranks outlive the test
    run.groups.drop()


@ranks(2)
def test_two_ranks(world):
    assert_masks(world, RING)
    assert_masks(world, RING, "causal")
    assert_masks(world, ULYSSES, attention_mask_on_cpu=True)


@ranks(4)
def test_four_ranks(world):
    for algorithm in (RING, ULYSSES, HYBRID, ADAPTIVE):
        assert_masks(world, algorithm)


@ranks(4)
def test_tiles_of_the_own_row(world):
    for algorithm in (RING, HYBRID):
        run = run_of(group=world.group, **plan_arguments(algorithm, 4, attention_mask_type="general"))
        plan, hidden = run.attention.maker.plan, masks()["prefix"]
        row, size = world.rank // plan.ulysses, S // plan.ring
        tiles = [hidden[row * size : (row + 1) * size, c * size : (c + 1) * size] for c in range(plan.ring)]
        set_attention_mask([tile if tile.any() else None for tile in tiles])
        truth = plan.layout(S, custom_mask=hidden)
        assert_parity(attention_of(run, layout=run.attention.maker.layout(S)), truth, world.rank)
        set_attention_mask(tiles[1:])
        with pytest.raises(ValueError, match=rf"expected {plan.ring} tiles of \[{size}, {size}\]"):
            run.attention.maker.layout(S)
        STORE.clear()
        run.groups.drop()


def test_tiles_need_plain_blocks():
    set_attention_mask([torch.zeros(4, 4, dtype=torch.bool)] * 2)
    with pytest.raises(ValueError, match="a list of tiles needs --attention-mask-type general"):
        run_of(**plan_arguments(RING, 2)).attention.maker.layout(8)


def test_a_mask_beside_documents_is_refused_when_it_is_set_later():
    set_attention_mask(masks()["prefix"])
    with pytest.raises(ValueError, match="documents are kept apart already"):
        run_of().attention.maker.layout(S, boundaries=((0, 5, S),))


def test_parts_of_a_mask_are_looked_at_once_for_all_layers():
    set_attention_mask(masks()["prefix"])
    run = run_of(**plan_arguments(RING, 2, attention_mask_type="general"))
    layout = run.attention.maker.layout(S)
    from mindspeed.core.context_parallel.work import AttentionOptions, plan_work

    first, second = (plan_work(layout, 0, 0, 1, AttentionOptions(0.3))[0] for _ in range(2))
    assert first.scoring.bias.hidden is second.scoring.bias.hidden


def test_the_programs_mask_comes_before_one_that_is_passed_and_before_the_layers_type():
    run, (own, passed, _) = run_of(), masks().values()
    set_attention_mask(own)
    for kind in ("causal", "no_mask", "padding"):
        assert_parity(attention_of(run, layer(kind), mask=passed), SequenceLayout(S, custom_mask=own), 0)
    set_attention_mask(None)
    assert_parity(attention_of(run, layer("causal"), mask=passed), SequenceLayout(S, custom_mask=passed), 0)
    assert_parity(attention_of(run, layer("causal")), SequenceLayout(S), 0)
    assert_parity(attention_of(run, layer("padding")), SequenceLayout(S, future=None), 0)
    assert STORE.generated is None  # the vendor's template is not needed here


@pytest.mark.parametrize("first_stage", [True, False])
def test_a_mask_that_changes_between_micro_batches_is_recomputed_as_it_was(first_stage):
    """Full recomputation; on the stage that reads batches and on one that only receives hidden states."""
    run = run_of(**plan_arguments(RING, 1))
    q, k, v, grad = draw(S, batch=1)
    inputs = [tensor.permute(2, 0, 1, 3).clone().requires_grad_() for tensor in (q, k, v)]
    received = None if first_stage else torch.zeros(S, 1, 4)
    model = SimpleNamespace(
        pre_process=first_stage,
        decoder=SimpleNamespace(input_tensor=received),
        config=SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False),
    )

    def forward(model_, input_ids):
        return _scoped(1)(checkpoint, run.attention, layer(), *inputs, None, use_reentrant=True)

    def micro_batch(mask):
        set_attention_mask(mask)
        return run._model_forward(forward, model, torch.zeros(1, S, dtype=torch.long))

    hidden = list(masks().values())
    outs = [micro_batch(mask) for mask in hidden[1:]]
    set_attention_mask(None)
    for mask, out in reversed(list(zip(hidden[1:], outs, strict=True))):
        for tensor in inputs:
            tensor.grad = None
        out.backward(grad.permute(2, 0, 1, 3).flatten(2))
        gradient = [tensor.grad for tensor in inputs]
        truth = dense(q, k, v, grad, SequenceLayout(S, custom_mask=mask), 0.3)
        for ours, true in zip(gradient, truth[1:], strict=True):
            torch.testing.assert_close(ours.permute(1, 2, 0, 3).double(), true, rtol=1e-5, atol=1e-5)


def test_a_mask_ends_with_its_run_and_outlives_other_flags():
    hidden = masks()["prefix"]
    set_attention_mask(hidden)
    with enabled(use_flash_attn=True):
        assert get_attention_mask() is hidden
        mindspeed.repatch({"sparse-mode": 1})
        assert get_attention_mask() is hidden
    assert not STORE.is_set and get_attention_mask(causal=False) is None


def test_a_run_without_flash_attention_refuses_a_mask_before_and_during_it():
    set_attention_mask(masks()["prefix"])
    with pytest.raises(ConfigError, match="set_attention_mask: only flash attention applies a mask .*reset the mask with None"):
        mindspeed.enable(use_flash_attn=False)
    assert STORE.is_set  # nothing has changed
    set_attention_mask(None)
    with enabled() as handle:
        with pytest.raises(ValueError, match="set_attention_mask: only flash attention applies a mask"):
            set_attention_mask(masks()["prefix"])
        set_attention_mask(None)
        mindspeed.repatch({"use-flash-attn": True})
        set_attention_mask(masks()["prefix"])
        assert "flash-attention" in handle.features
    set_attention_mask(masks()["prefix"])
    assert STORE.is_set


def test_a_finished_trainer_run_leaves_no_mask():
    hidden = torch.zeros(32, 32, dtype=torch.bool).triu(1)
    set_attention_mask(hidden)
    train(f"{TINY} --num-layers 1 --train-iters 1 --use-flash-attn")
    assert not STORE.is_set


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Training with a prefix mask on one device, which equals the host's own attention with that mask as a tensor."""
    folder = tmp_path_factory.mktemp("masks")
    flags = f"{TINY} --position-embedding-type rope --use-flash-attn --attention-mask-type general"
    flags = f"{flags} {seed_checkpoint(folder / 'seed', flags)}"
    hidden = torch.ones(32, 32, dtype=torch.bool).triu(1)
    hidden[:, :9] = False
    plain = train(flags).curve
    set_attention_mask(hidden)
    curve = train(flags).curve
    set_attention_mask(None)
    assert curve != plain

    def with_mask(iterator):
        tokens, labels, loss_mask, _, position_ids = get_batch(iterator)
        return tokens, labels, loss_mask, hidden[None, None], position_ids

    with pytest.MonkeyPatch.context() as patch:
        get_batch = data.get_batch
        patch.setattr(data, "get_batch", with_mask)
        assert_same_digits(train(flags.replace("--use-flash-attn", "")).curve, curve)
    return flags, hidden, curve


@ranks(4, megatron=True)
@pytest.mark.parametrize(
    "layout",
    [
        "--pipeline-model-parallel-size 4",
        "--context-parallel-size 2 --pipeline-model-parallel-size 2",
        "--context-parallel-size 4 --context-parallel-algo ulysses_cp_algo",
        "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
        "--context-parallel-size 4 --context-parallel-algo kvallgather_cp_algo",
        "--context-parallel-size 4 --context-parallel-algo adaptive_cp_algo",
        "--context-parallel-size 2 --context-parallel-algo adaptive_cp_algo --pipeline-model-parallel-size 2",
    ],
    ids=["stages", "ring and stages", "ulysses", "hybrid", "gather", "adaptive", "adaptive and stages"],
)
def test_every_rank_and_stage_sees_the_mask(world, layout, reference):
    flags, hidden, expected = reference
    set_attention_mask(hidden)
    try:
        recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        curve = train(f"{flags} {layout} {recompute}").curve
    finally:
        set_attention_mask(None)
    if world.rank == world.size - 1:
        assert [(step, float(loss)) for step, loss, _ in curve] == [
            (step, pytest.approx(float(loss), abs=1.5e-6)) for step, loss, _ in expected
        ]
