"""Layouts hold every token once; tiles cover every visible pair once and skip what is hidden."""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed.core.attention import CAUSAL, FULL
from mindspeed.core.context_parallel.documents import boundaries_of, restarted_positions
from mindspeed.core.context_parallel.layout import SequenceLayout, positions_of, slice_batch, take
from mindspeed.core.context_parallel.placement import contiguous, document_zigzag, piece, zigzag
from mindspeed.core.context_parallel.scope import current_layout, layout_scope
from mindspeed.core.context_parallel.tiles import Rule, plan_tiles, visible_entries


def listed(layout, rank):
    return layout.index(rank).tolist()


def test_ring_of_two():
    layout = SequenceLayout(8, ring=2)
    assert [listed(layout, rank) for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_hybrid_of_four():
    layout = SequenceLayout(16, ring=2, ulysses=2)
    assert [listed(layout, rank) for rank in range(4)] == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_ulysses_of_two():
    layout = SequenceLayout(8, ulysses=2)
    assert [listed(layout, rank) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_documents_in_zigzag():
    first, second = document_zigzag((0, 8, 12), 2)
    assert positions_of(first).tolist() == [0, 1, 6, 7, 8, 11]
    assert positions_of(second).tolist() == [2, 3, 4, 5, 9, 10]


@st.composite
def documents(draw, ranks):
    length = draw(st.integers(1, 12)) * 2 * ranks
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=10)) if length > 1 else set()
    return (0, *sorted(cuts), length)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_placements_hold_every_token_once_and_equally(data):
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    boundaries = data.draw(documents(ranks))
    length = boundaries[-1]
    for placement in (contiguous(length, ranks), zigzag(length, ranks), document_zigzag(boundaries, ranks)):
        held = [positions_of(segments).tolist() for segments in placement]
        assert {len(tokens) for tokens in held} == {length // ranks}
        assert sorted(itertools.chain(*held)) == list(range(length))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_document_zigzag_balances_each_document_to_a_token_a_chunk(data):
    ranks = data.draw(st.sampled_from([2, 4]))
    boundaries = data.draw(documents(ranks))
    held = [positions_of(segments) for segments in document_zigzag(boundaries, ranks)]
    for start, stop in itertools.pairwise(boundaries):
        counts = [int(((tokens >= start) & (tokens < stop)).sum()) for tokens in held]
        assert max(counts) - min(counts) <= 2


def visible_pairs(rows, keys, rule):
    """Brute force: rows and keys are positions in local order."""
    row, key = rows[:, None], keys[None, :]
    seen = torch.ones(len(rows), len(keys), dtype=torch.bool)
    if rule.past is not None:
        seen &= key >= row - rule.past
    if rule.future is not None:
        seen &= key <= row + rule.future
    if rule.boundaries is not None:
        document = torch.bucketize(torch.arange(rule.boundaries[-1]), torch.tensor(rule.boundaries[1:]), right=True)
        seen &= document[rows][:, None] == document[keys][None, :]
    return seen


def covered_pairs(tiles, num_rows, num_keys):
    count = torch.zeros(num_rows, num_keys, dtype=torch.int64)
    for tile in tiles:
        rows, keys = range(tile.rows.stop - tile.rows.start), range(tile.keys.stop - tile.keys.start)
        hidden = tile.visible.mask(rows, keys, torch.device("cpu"))
        count[tile.rows, tile.keys] += 1 if hidden is None else (~hidden).long()
    return count


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_tiles_cover_each_visible_pair_exactly_once(data):
    ranks = data.draw(st.sampled_from([1, 2, 4]))
    boundaries = data.draw(documents(ranks))
    length = boundaries[-1]
    future = data.draw(st.none() | st.integers(-1, 3))
    rule = Rule(
        past=data.draw(st.none() | st.integers(1, length)),
        future=future,
        boundaries=data.draw(st.sampled_from([None, boundaries])),
    )
    placement = data.draw(
        st.sampled_from([contiguous(length, ranks), zigzag(length, ranks), document_zigzag(boundaries, ranks)])
    )
    join = data.draw(st.booleans())
    for queries, keys in itertools.product(placement, repeat=2):
        rows, columns = positions_of(queries), positions_of(keys)
        seen = visible_pairs(rows, columns, rule)
        tiles = plan_tiles(queries, keys, rule, join=join)
        assert torch.equal(covered_pairs(tiles, len(rows), len(columns)), seen.long())
        assert visible_entries(tiles) == int(seen.sum())
        assert bool(tiles) == bool(seen.any())


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_causal_ring_is_one_kernel_call_a_step_with_equal_work(ranks):
    layout = SequenceLayout(16 * ranks, ring=ranks)
    chunk = 8
    work = []
    for rank in range(ranks):
        entries = 0
        for other in range(ranks):
            (tile,) = layout.tiles(rank, other)
            entries += visible_entries((tile,))
            if other == rank:
                assert tile.visible == CAUSAL and tile.rows == tile.keys == slice(0, 2 * chunk)
            elif other < rank:
                assert tile.visible == FULL and tile.rows == slice(0, 2 * chunk) and tile.keys == slice(0, chunk)
            else:
                assert tile.visible == FULL and tile.rows == slice(chunk, 2 * chunk) and tile.keys == slice(0, 2 * chunk)
        work.append(entries)
    assert set(work) == {chunk * chunk * (2 * ranks - 1) + chunk * (chunk + 1)}


def test_whole_sequence_zigzag_with_documents_is_mask_free_off_the_diagonal():
    layout = SequenceLayout(48, ring=2, boundaries=((0, 5, 29, 48),))
    for tile in layout.tiles(0, 1) + layout.tiles(1, 0):
        assert tile.visible == FULL
    assert all(tile.visible.is_causal for tile in layout.tiles(0, 0) if tile.rows == tile.keys)


def test_band_tiles_visit_the_band_only():
    layout = SequenceLayout(1024, ring=4, placement="contiguous", past=64)
    assert layout.tiles(2, 0) == () and layout.tiles(0, 1) == ()
    (edge,) = layout.tiles(2, 1)
    assert edge.rows == slice(0, 64) and edge.keys == slice(192, 256)


def test_pieces_of_a_block():
    block = zigzag(16, 2)[0]
    assert [piece(block, index, 4) for index in range(4)] == [((0, 2),), ((2, 4),), ((12, 14),), ((14, 16),)]
    with pytest.raises(ValueError, match="8 tokens does not divide into 3"):
        piece(block, 0, 3)


@pytest.mark.parametrize(("maker", "parts"), [(contiguous, 3), (zigzag, 6), (lambda s, r: document_zigzag((0, s), r), 6)])
def test_lengths_that_do_not_divide_are_refused(maker, parts):
    with pytest.raises(ValueError, match=f"10 tokens does not divide into {parts}"):
        maker(10, 3)


def test_documents_end_after_their_token():
    tokens = torch.tensor([[5, 0, 7, 8, 0, 9], [1, 2, 3, 4, 5, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert boundaries_of(tokens, eod=0) == ((0, 2, 5, 6), (0, 6), (0, 1, 2, 3, 4, 5, 6), (0, 6))


def test_positions_restart_in_each_document():
    assert restarted_positions((0, 2, 5, 6)).tolist() == [0, 1, 0, 1, 2, 0]
    layout = SequenceLayout(6, ulysses=2, boundaries=((0, 2, 6), (0, 5, 6)), restart_positions=True)
    assert layout.position_ids(1).tolist() == [[1, 2, 3], [3, 4, 0]]


def test_batches_follow_the_layout():
    layout = SequenceLayout(8, ring=2)
    batch = {
        "tokens": torch.arange(16).view(2, 8),
        "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "labels": None,
        "lengths": torch.tensor([8, 8]),
    }
    mine = slice_batch(batch, layout, 1)
    assert mine["tokens"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert mine["attention_mask"] is None and mine["labels"] is None and mine["lengths"] is batch["lengths"]


def test_per_sample_layouts_gather_per_sample():
    layout = SequenceLayout(8, ring=2, placement="document_zigzag", boundaries=((0, 8), (0, 4, 8)))
    tokens = torch.arange(16).view(2, 8)
    assert take(tokens, layout.index(0), 1).tolist() == [[0, 1, 6, 7], [8, 11, 12, 15]]
    with pytest.raises(ValueError, match="batch-first"):
        take(tokens, layout.index(0), 0)


def test_scopes_nest_and_belong_to_a_thread():
    outer, inner = SequenceLayout(4), SequenceLayout(8)
    seen = []
    with layout_scope(outer):
        with layout_scope(inner):
            assert current_layout() is inner
            thread = threading.Thread(target=lambda: seen.append(current_layout()))
            thread.start()
            thread.join()
        assert current_layout() is outer
    assert current_layout() is None and seen == [None]
