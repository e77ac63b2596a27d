"""Packed sequences of other programs: places, padding, rotary positions, and attention under every algorithm."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.maker import LayoutMaker
from mindspeed.core.context_parallel.packed import packed_layout, positions_in_sequences
from mindspeed.core.context_parallel.plan import ADAPTIVE, GATHER, HYBRID, RING, ULYSSES, ContextPlan
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import set_attention_mask
from mindspeed.testing import ranks
from tests.core.context_parallel.dense import assert_parity
from tests.core.transformer.attention_of_a_run import attention_of, layer, plan_arguments, run_of


def packed(ends, padded=None, **changes):
    """As megatron-core's PackedSeqParams."""
    cumulative = {"": ends, "_padded": padded}
    fields = {
        f"cu_seqlens_{side}{suffix}": None if values is None else torch.tensor(values, dtype=torch.int32)
        for side in ("q", "kv")
        for suffix, values in cumulative.items()
    }
    return SimpleNamespace(**{"qkv_format": "thd", **fields, **changes})


def test_places_follow_the_hosts_convention():
    layout = packed_layout(LayoutMaker(ContextPlan(RING, 2)), 12, [0, 8, 12])
    assert layout.index(0).flatten().tolist() == [0, 1, 6, 7, 8, 11]
    assert layout.index(1).flatten().tolist() == [2, 3, 4, 5, 9, 10]
    assert positions_in_sequences(layout, 0, [0, 8, 12]).tolist() == [0, 1, 6, 7, 0, 3]
    hybrid = packed_layout(LayoutMaker(ContextPlan(HYBRID, 4, degree=2)), 16, [0, 8, 16])
    assert [hybrid.index(rank).flatten().tolist() for rank in range(4)] == [
        [0, 1, 6, 7],
        [8, 9, 14, 15],
        [2, 3, 4, 5],
        [10, 11, 12, 13],
    ]
    assert positions_in_sequences(hybrid, 1, [0, 8, 16]).tolist() == [0, 1, 6, 7]
    ulysses = packed_layout(LayoutMaker(ContextPlan(ULYSSES, 2)), 10, [0, 3, 10])
    assert ulysses.index(1).tolist() == [5, 6, 7, 8, 9]
    assert positions_in_sequences(ulysses, 1, [0, 3, 10]).tolist() == [2, 3, 4, 5, 6]


# ends of the sequences, places of the padded ones, and what may see what
CASES = [
    ([0, 24, 40, 64], None, (0, 24, 40, 64)),
    ([0, 21, 33, 50], [0, 24, 40, 64], (0, 21, 24, 36, 40, 57, 64)),
]


def assert_packed(algorithm, world):
    run = run_of(group=world.group, **plan_arguments(algorithm, world.size))
    plan = run.attention.maker.plan
    for ends, padded, boundaries in CASES:
        for kind, future in (("causal", 0), ("padding_causal", 0), ("no_mask", None)):
            layout = SequenceLayout(
                64,
                ring=plan.ring,
                ulysses=plan.ulysses,
                placement="document_zigzag" if plan.ring > 1 else "contiguous",
                boundaries=(boundaries,),
                cuts=(tuple(padded or ends),),
                future=future,
            )
            attention = attention_of(run, layer(kind), packed=packed(ends, padded))
            assert_parity(attention, layout, world.rank, batch=1, value_dim=4)
    run.groups.drop()


def test_one_device():
    assert_packed(RING, SimpleNamespace(size=1, rank=0, group=None))


@ranks(2)
def test_two_ranks(world):
    for algorithm in (RING, ULYSSES):
        assert_packed(algorithm, world)


@ranks(4)
def test_four_ranks(world):
    for algorithm in (RING, ULYSSES, HYBRID, GATHER):
        assert_packed(algorithm, world)


def test_rotary_rows_follow_the_layout_where_the_host_assumes_a_ring():
    run = run_of(**plan_arguments(HYBRID, 4))
    asked = []

    def rotate(t, freqs, **options):
        asked.append((freqs.flatten().tolist(), options["mscale"]))
        return t

    object.__setattr__(run, "rotate", rotate)
    table = torch.arange(16.0).view(16, 1, 1, 1)
    out = run._packed_rotary(None, torch.zeros(4, 2, 8), torch.tensor([0, 8, 16]), table, False, True, 0.5)
    assert out.shape == (4, 2, 8) and asked == [([0.0, 1.0, 6.0, 7.0], 0.5)]
    assert run_of()._packed_rotary(lambda *args: "host", None, None, None) == "host"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (packed([0, 6, 16]), r"a sequence of 6 tokens must be padded to a multiple of 4 \(2 x ring size\)"),
        (packed([0, 8, 12]), "sequences end at 12, but the batch has 16 tokens"),
        (packed([0, 9, 16], [0, 8, 16]), "a sequence of 9 tokens does not fit its padded length 8"),
        (packed([0, 8, 16], [0, 16]), "3 entries of cu_seqlens and 2 of the padded ones"),
        (packed([0, 16, 8, 16]), "must start at 0 and not fall"),
        (packed([0, 16], cu_seqlens_kv=torch.tensor([0, 8])), "cu_seqlens_q and cu_seqlens_kv differ"),
        (packed([0, 16], qkv_format="sbhd"), "expected qkv_format thd, got sbhd"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(parameters, words):
    run = run_of(**plan_arguments(RING, 2))
    inputs = [torch.randn(8, 4, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=words):
        run.attention(layer(), *inputs, None, packed=parameters)


def test_a_mask_beside_packed_sequences_is_refused():
    set_attention_mask(torch.zeros(16, 16, dtype=torch.bool))
    try:
        with pytest.raises(ValueError, match="use one of the two"):
            run_of().attention(layer(), *(torch.randn(16, 4, 4) for _ in range(3)), None, packed=packed([0, 16]))
    finally:
        set_attention_mask(None)


def test_an_adaptive_algorithm_does_not_keep_sequences_apart_and_says_so():
    run = run_of(**plan_arguments(ADAPTIVE, 2))
    inputs = [torch.randn(8, 4, 4) for _ in range(3)]
    with pytest.raises(
        ValueError, match="packed_seq_params: --context-parallel-algo adaptive_cp_algo does not keep sequences apart"
    ):
        run.attention(layer(), *inputs, None, packed=packed([0, 8, 16]))
