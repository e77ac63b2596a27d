"""What went wrong silently elsewhere and must not here: each row of the specification's list of defects has its test.

Rows 4 (ALiBi without a type), 6 (one mask state), 8 (latent attention), 9 (dropout), 11 (buffers) and 14 (groups) are in
tests of their features, which name the row. The others are here.
"""

import argparse
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mindspeed.core.attention import Accumulator
from mindspeed.core.context_parallel.adaptive.schedule import schedule_tiles
from mindspeed.core.context_parallel.documents import boundaries_of
from mindspeed.core.context_parallel.kv_cache_policy import KvCachePolicy
from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.core.context_parallel.placement import document_zigzag
from mindspeed.core.context_parallel.ulysses import repeats_needed
from mindspeed.core.context_parallel.ulysses_context_parallel.ulysses_context_parallel import (
    GatherSizeCalculator,
    UlyssesContextAttention,
)
from mindspeed.core.transformer.flash_attention.feature import FlashFlags
from mindspeed.errors import ConfigError
from mindspeed.patching import RunShape
from mindspeed.patching.flags import read_flags
from mindspeed.testing import count_communication, ranks
from tests.core.context_parallel.dense import assert_parity
from tests.core.transformer.attention_of_a_run import RING, ULYSSES, attention_of, layer, plan_arguments, run_of

S = 64


def test_row_1_causal_comes_from_the_layer_not_from_the_data_set():
    run = run_of(create_attention_mask_in_dataloader=False)
    assert_parity(attention_of(run), SequenceLayout(S), 0)


@ranks(2)
def test_rows_2_and_3_the_type_of_a_layer_is_never_overruled(world):
    """`general` shows a causal layer no future; `causal` is refused for a layer that sees all."""
    for kind, future in (("causal", 0), ("no_mask", None), ("padding", None)):
        for mask_type in ("general", "causal"):
            run = run_of(group=world.group, **plan_arguments(RING, 2, attention_mask_type=mask_type))
            layout = run.attention.maker.plan.layout(S, future=future)
            if future is None and mask_type == "causal":
                with pytest.raises(ConfigError, match=f"a layer of type {kind} sees the future.*general"):
                    attention_of(run, layer(kind))(*[torch.randn(1, 4, S // 2, 4) for _ in range(3)])
            else:
                assert_parity(attention_of(run, layer(kind)), layout, world.rank)
            run.groups.drop()


@pytest.mark.parametrize(
    ("kind", "attention", "words"),
    [
        ("padding", "self", "--attention-mask-type causal: a layer of type padding sees the future"),
        ("no_mask", "self", "--attention-mask-type causal: a layer of type no_mask sees the future"),
        ("causal", "cross", "--context-parallel-size 2: a layer of cross attention has other keys than queries"),
    ],
)
def test_row_3_layers_that_cannot_be_shared_out_are_refused_when_they_are_built(kind, attention, words):
    run, built = run_of(**plan_arguments(ULYSSES, 2)), SimpleNamespace()

    def original(module, config, layer_number, attn_mask_type, attention_type):
        module.layer_number, module.attn_mask_type, module.attention_type = layer_number, attn_mask_type, attention_type

    config = SimpleNamespace(context_parallel_size=2)
    general = run_of(**plan_arguments(ULYSSES, 2, attention_mask_type="general"))
    for one in (run, general):
        object.__setattr__(one, "layer_offset", lambda config: 0)
    with pytest.raises(ConfigError, match=words):
        run._build(original, built, config, 1, SimpleNamespace(name=kind), attention)
    run._build(original, built, config, 1, SimpleNamespace(name="causal"), "self")
    general._build(original, built, config, 1, SimpleNamespace(name="padding"), "self")


@pytest.mark.parametrize("place", ["inference_context", "inference_params", 5])
def test_inference_with_a_cache_is_refused_over_ranks(place):
    model = SimpleNamespace(pre_process=True)
    args = [None] * 5 + [object()] if place == 5 else []
    named = {} if place == 5 else {place: object()}
    with pytest.raises(ValueError, match="inference with a key-value cache is not shared out; use --context-parallel-size 1"):
        run_of(**plan_arguments(RING, 2))._model_forward(lambda model, *args, **kwargs: "out", model, *args, **named)
    assert run_of()._model_forward(lambda model, *args, **kwargs: "out", model, *args, **named) == "out"


def test_row_5_a_given_band_binds_causal_layers():
    run = run_of(FlashFlags(pre_tockens=5), given={"pre_tockens"})
    assert_parity(attention_of(run), SequenceLayout(S, past=5), 0)


def test_row_7_gathered_keys_need_no_cache_policy():
    run = run_of(**plan_arguments(ULYSSES, 2, use_ulysses_allgather_kv=True))
    plan = run.attention.maker.plan
    assert plan.allgather_kv and plan.cache is None
    values = dict(use_ulysses_allgather_kv=True, context_parallel_kv_cache_policy=None, context_parallel_cache_interval=0)
    shape = dict(group_query_attention=True, num_query_groups=1, num_attention_heads=4, num_layers=2)
    shape |= plan_arguments(ULYSSES, 2)
    feature = KvCachePolicy()
    run_shape = RunShape(argparse.Namespace(**values, **shape), "cpu")
    assert list(feature.check(read_flags(feature.flags, values), run_shape)) == []
    assert feature.why(read_flags(feature.flags, values), run_shape) == "--use-ulysses-allgather-kv"


@pytest.mark.parametrize("ring", [2, 4])
def test_row_10_documents_lose_no_token_and_none_is_empty(ring):
    tokens = torch.ones(1, 48, dtype=torch.long)
    tokens[0, [6, 7, 20, 47]] = 0  # two in a row, and one at the very end
    (boundaries,) = boundaries_of(tokens, 0)
    assert boundaries == (0, 7, 8, 21, 48)
    held = [position for block in document_zigzag(boundaries, ring) for segment in block for position in range(*segment)]
    assert sorted(held) == list(range(48))


def test_row_12_partial_results_are_summed_in_fp32():
    query = torch.randn(1, 2, 5, 4, dtype=torch.bfloat16)
    total = Accumulator(query, 4)
    total.add(torch.randn(1, 2, 5, 4, dtype=torch.bfloat16), torch.randn(1, 2, 5))
    total.add(torch.randn(1, 2, 5, 4, dtype=torch.bfloat16), torch.randn(1, 2, 5))
    assert total.out.dtype == total.lse.dtype == torch.float32


def test_row_13_a_forward_changes_neither_config_nor_arguments():
    arguments = plan_arguments(RING, 1, position_embedding_type="alibi", alibi_fusion_attn_type=2)
    run, module = run_of(**arguments), layer(dropout=0.1)
    before = copy.deepcopy(vars(module.config))
    inputs = [torch.randn(S, 1, 4, 4) for _ in range(3)]
    run.attention(module, *inputs, None)
    run.attention(module, *[tensor[:20] for tensor in inputs], None)  # lengths come from tensors
    assert vars(module.config) == before


@pytest.mark.parametrize(("groups", "degree", "repeats"), [(2, 4, 2), (4, 2, 1), (6, 4, 2), (3, 2, 2), (1, 8, 8)])
def test_row_15_key_heads_are_repeated_as_little_as_needed(groups, degree, repeats):
    assert repeats_needed(groups, degree) == repeats


def test_row_16_an_empty_diagonal_is_scheduled():
    grid = [[row != column for column in range(4)] for row in range(4)]
    tasks = [task for tasks in schedule_tiles(grid) for task in tasks]
    assert sorted((task.row, task.column) for task in tasks) == [(r, c) for r in range(4) for c in range(4) if r != c]


class Total(GatherSizeCalculator):
    def calculate(self, *args, **kwargs):
        return 10


@ranks(2)
def test_row_17_a_cache_policy_with_unequal_pieces_is_refused(world):
    inputs = [torch.randn(5, 1, 2, 4) for _ in range(3)]
    wrapper = UlyssesContextAttention(lambda q, k, v: q, world.group, gather_size_calculator=Total(), cache_policy="full")
    with pytest.raises(ValueError, match="cache_policy full needs equal pieces, but the gather-size calculator says 10 tokens"):
        wrapper(*inputs)
    with pytest.raises(ValueError, match="cache_policy 'some'"):
        UlyssesContextAttention(lambda q, k, v: q, world.group, cache_policy="some")


@pytest.mark.counted
@ranks(4)
def test_the_wrapper_keeps_what_its_policy_says(world):
    """Bit-equal results; the exchanged keys, then the values too, are gone after forward and exchanged again in backward."""
    generator = torch.Generator().manual_seed(world.rank)
    leaves = [torch.randn(8, 1, heads, 8, generator=generator, requires_grad=True) for heads in (8, 1, 1)]
    grad = torch.randn(8, 1, 64, generator=generator)
    run, module = run_of(), layer(heads=2)
    results, exchanged = {}, []

    def local(q, k, v):
        exchanged[:] = [StorageWeakRef(tensor.untyped_storage()) for tensor in (k, v)]
        return run.attention(module, q, k, v, None)

    for policy, freed in ((None, [False, False]), ("half", [True, False]), ("full", [True, True])):
        out = UlyssesContextAttention(local, world.group, cache_policy=policy)(*leaves)
        assert [storage.expired() for storage in exchanged] == freed
        with count_communication() as backward:
            results[policy] = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert backward.calls("all_to_all") == 4 + sum(freed)
    for policy in ("half", "full"):
        assert all(torch.equal(ours, plain) for ours, plain in zip(results[policy], results[None], strict=True))
