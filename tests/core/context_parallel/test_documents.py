"""Where documents end, at every edge: masks and positions equal the host's, and every algorithm equals dense attention."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mindspeed.core.context_parallel.documents import boundaries_of
from mindspeed.core.context_parallel.layout import slice_batch
from mindspeed.core.context_parallel.placement import document_zigzag
from mindspeed.core.context_parallel.scope import current_layout, layout_scope
from mindspeed.core.context_parallel.tiles import visible_entries
from mindspeed.notices import warn_once
from mindspeed.testing import ranks
from tests.core.context_parallel.dense import assert_parity, hidden_pairs
from tests.core.transformer.attention_of_a_run import (
    GATHER,
    HYBRID,
    RING,
    ULYSSES,
    LargestTensor,
    attention_of,
    layer,
    plan_arguments,
    run_of,
)

S, END = 64, 0
# Positions of end-of-document tokens; chunks of a ring of four are 8 tokens long.
ENDS = {
    "none": [],
    "the last token": [63],
    "the first token": [0],
    "some in a row": [20, 21, 22, 23],
    "two at the end": [62, 63],
    "everywhere": list(range(64)),
    "beside every border": [position for border in range(8, 64, 8) for position in (border - 1, border)],
    "across every border": [3, 12, 19, 28, 35, 44, 51, 60],
}


def tokens_of(name):
    tokens = torch.arange(1, S + 1)
    tokens[ENDS[name]] = END
    return tokens


def hosts(tokens):
    """The host's mask [1, S, S] (True = hidden) and positions [S] of one sample."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    mask, _, positions = _get_ltor_masks_and_position_ids(tokens, END, True, True, False, True)
    return mask, positions


@pytest.mark.parametrize("name", ENDS)
def test_masks_and_positions_are_the_hosts(name):
    tokens = tokens_of(name)
    run = run_of(**plan_arguments(RING, 1), reset_attention_mask=True, reset_position_ids=True)
    layout = run.batches.maker.layout(S, boundaries=run.batches.documents(tokens[None]), restart_positions=True)
    mask, positions = hosts(tokens)
    assert torch.equal(hidden_pairs(layout, 1)[0], mask)
    assert torch.equal(layout.position_ids(0)[0], positions)
    ends = layout.boundaries[0]
    assert all(first < second for first, second in zip(ends, ends[1:], strict=False))  # no document is empty


@pytest.mark.parametrize("algorithm", [RING, ULYSSES, HYBRID, GATHER])
def test_batches_hold_every_token_with_its_own_position(algorithm):
    """All edges in one batch: what the ranks get, put together, are the host's tokens and positions."""
    tokens = torch.stack([tokens_of(name) for name in ENDS])
    positions = torch.stack([hosts(sample)[1] for sample in tokens])
    maker = run_of(**plan_arguments(algorithm, 4)).batches.maker
    layout = maker.layout(S, boundaries=boundaries_of(tokens, END), restart_positions=True)
    placements = ["document_zigzag", "zigzag"] if algorithm in (RING, HYBRID) else [layout.placement]
    for placement in placements:
        layout = replace(layout, placement=placement)
        batch = {"tokens": tokens, "position_ids": torch.zeros_like(tokens), "loss_mask": None}
        parts = [slice_batch(batch, layout, rank) for rank in range(4)]
        indices = [layout.index(rank).expand(len(ENDS), -1) for rank in range(4)]
        order = torch.cat(indices, 1).argsort(1)
        for key, whole in (("tokens", tokens), ("position_ids", positions)):
            assert torch.equal(torch.cat([part[key] for part in parts], 1).gather(1, order), whole)


PLANS = {
    "ring": dict(context_parallel_algo=RING),
    "general": dict(context_parallel_algo=RING, attention_mask_type="general"),
    "double": dict(context_parallel_algo=RING, cp_window_size=2),
    "ulysses": dict(context_parallel_algo=ULYSSES),
    "hybrid": dict(context_parallel_algo=HYBRID, ulysses_degree_in_cp=2),
    "gather": dict(context_parallel_algo=GATHER),
}


def assert_edges(world, plan):
    """Each edge alone, and all of them as samples of one batch; by documents and by the whole sequence."""
    run = run_of(group=world.group, context_parallel_size=world.size, **plan)
    edges = [[name] for name in ENDS] + [list(ENDS)]
    for names in edges:
        boundaries = boundaries_of(torch.stack([tokens_of(name) for name in names]), END)
        made = run.attention.maker.layout(S, boundaries=boundaries)
        placements = {"zigzag", "document_zigzag"} if made.placement in ("zigzag", "document_zigzag") else {made.placement}
        for placement in sorted(placements):
            layout = replace(made, placement=placement)
            assert_parity(attention_of(run, layout=layout), layout, world.rank, batch=len(names))
    run.groups.drop()


@ranks(2)
@pytest.mark.parametrize("name", ["ring", "general", "ulysses", "gather"])
def test_two_ranks_at_every_edge(world, name):
    assert_edges(world, PLANS[name])


@ranks(4)
@pytest.mark.parametrize("name", PLANS)
def test_four_ranks_at_every_edge(world, name):
    assert_edges(world, PLANS[name])


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_work_is_balanced_to_a_token_per_document(ring):
    """Per-document zigzag: ranks differ by what single tokens of each document see, not by documents."""
    boundaries = (0, 1000, 1700, 4096)
    run = run_of(**plan_arguments(RING, ring))
    layout = run.attention.maker.layout(4096, boundaries=(boundaries,))
    assert layout.placement == "document_zigzag" and len(document_zigzag(boundaries, ring)) == ring
    work = [sum(visible_entries(layout.tiles(rank, other)) for other in range(ring)) for rank in range(ring)]
    assert max(work) / (sum(work) / ring) < 1.01
    whole = replace(layout, placement="zigzag")
    uneven = [sum(visible_entries(whole.tiles(rank, other)) for other in range(ring)) for rank in range(ring)]
    assert sum(uneven) == sum(work) and max(uneven) > max(work)


@pytest.mark.counted
def test_nothing_of_the_square_of_the_sequence_is_made():
    run = run_of(reset_attention_mask=True)
    layout = run.attention.maker.layout(3000, boundaries=((0, 700, 701, 2400, 3000),))
    leaves = [torch.randn(1, 4, 3000, 8).requires_grad_() for _ in range(3)]
    with LargestTensor() as made:
        attention_of(run, layout=layout)(*leaves).sum().backward()
    assert made.elements < 3000 * 3000 / 8


def test_a_second_model_on_the_tokens_of_a_batch_stays_inside_its_documents(caplog):
    run = run_of(reset_attention_mask=True)
    tokens = torch.stack([tokens_of(name) for name in ENDS])
    run.batches._pending.boundaries = boundaries_of(tokens, END)  # as the read of a batch leaves them
    batch = run.batches.cut({"tokens": tokens})
    seen = []
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mindspeed"):
        for called_with in (batch["tokens"], batch["tokens"], batch["tokens"].clone()):
            with run.batches.around_model(S, tokens=called_with):
                seen.append(current_layout())
    assert seen[0].boundaries == boundaries_of(tokens, END) and seen[1] is seen[0]
    assert seen[2] is None and "its documents are not known" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_that_forgot_the_documents_is_refused(reentrant):
    """torch's checkpoint re-runs layers after the model, megatron-core's opens the scope again."""
    run = run_of(reset_attention_mask=True)
    layout = run.attention.maker.layout(S, boundaries=((0, 5, S),))
    leaves = [torch.randn(S, 1, 4, 8).requires_grad_() for _ in range(3)]

    def attention(*inputs):
        return run.attention(layer(), *inputs, None)

    scoped = [patch.value for patch in run.attention_patches() if patch.target.endswith("random:checkpoint")][0]
    by_host = lambda function, *inputs: scoped(  # noqa: E731
        lambda function, *inputs: checkpoint(function, *inputs, use_reentrant=reentrant), function, *inputs
    )
    with layout_scope(layout):
        plain, kept = attention(*leaves), by_host(attention, *leaves)
        lost = checkpoint(attention, *leaves, use_reentrant=reentrant)
    expected = torch.autograd.grad(plain.sum(), leaves)
    kept.sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    with pytest.raises(ValueError, match="--reset-attention-mask: documents are known while the GPT model runs"):
        lost.sum().backward()
