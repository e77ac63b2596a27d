"""The attention kernel of context parallelism on NPU: what is launched per kind of tile, with which mask, shapes, gradients."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

BF16 = torch.bfloat16
B, N, G, S, D = 2, 4, 2, 8, 16
NO_LIMIT = 2147483647


def heads(count, length=S, dim=D, dtype=BF16):
    """[B, heads, S, D] view of sequence-first memory, as the layers hand it over."""
    return torch.zeros(length, B, count, dim, dtype=dtype, device="npu").permute(1, 2, 0, 3)


@contextlib.contextmanager
def arguments_of_kernels():
    """The keyword arguments of `npu_fusion_attention_v2` and of its gradient, call by call; both really run."""
    import torch_npu

    seen = []

    def watched(original):
        return lambda *tensors, **options: seen.append(options) or original(*tensors, **options)

    with contextlib.ExitStack() as stack:
        for name in ("npu_fusion_attention_v2", "npu_fusion_attention_grad_v2"):
            stack.enter_context(mock.patch.object(torch_npu, name, watched(getattr(torch_npu, name))))
        yield seen


def scoring_of(kind, **options):
    from mindspeed.core.attention import CAUSAL, FULL, Scoring, Visibility
    from mindspeed.core.attention.bias import AlibiBias, MaskBias

    positions, slopes = torch.arange(S), torch.ones(N, device="npu")
    visible, bias = {
        "causal": (CAUSAL, None),
        "full": (FULL, None),
        "band": (Visibility(past=3, future=0), None),
        "mask": (FULL, MaskBias(torch.zeros(S, S, dtype=torch.bool, device="npu"))),
        "alibi": (CAUSAL, AlibiBias(slopes, positions, positions)),
        "alibi-root": (FULL, AlibiBias(slopes, positions + 24, positions + 8, "root")),
        "alibi-signed": (CAUSAL, AlibiBias(slopes, positions, positions, "signed")),
        "tensor": (FULL, torch.zeros(1, N, S, S, device="npu")),
    }[kind]
    return Scoring(0.25, visible, bias, **options)


def attention_calls(calls):
    return [call for call in calls if "FlashAttention" in call.name or "Dropout" in call.name]


def plain(name):
    return name.removesuffix("V3").removesuffix("V2")


MASKS = {"causal": (2048, 2048), "band": (2048, 2048), "mask": (S, S), "alibi": (2048, 2048), "alibi-signed": (2048, 2048)}


@npu_contract()
@pytest.mark.parametrize("order", ["SBH", "BNSD"])
@pytest.mark.parametrize("kind", ["causal", "full", "band", "mask", "alibi", "alibi-signed", "tensor"])
def test_one_kernel_forward_and_one_backward(calls, kind, order):
    from mindspeed.core.attention import attend, attend_backward

    q, k, v, scoring = heads(N), heads(G), heads(G), scoring_of(kind, memory_order=order)
    calls.reset()
    out, lse, state = attend(q, k, v, scoring)
    (call,) = attention_calls(calls)
    assert call.name == "aclnnFlashAttentionScoreV2"
    shape = (S, B, N * D) if order == "SBH" else (B, N, S, D)
    assert call.tensors[0].shape == shape and call.tensors[0].dtype == "bfloat16"
    masks = [argument.shape for argument in call.tensors if argument.dtype == "bool"]
    assert masks == ([MASKS[kind]] if kind in MASKS else [] if kind == "full" else [(1, N, S, S)])
    assert (out.shape, out.dtype, lse.shape, lse.dtype, state) == (q.shape, BF16, (B, N, S), torch.float32, None)
    calls.reset()
    gradients = attend_backward(out, q, k, v, out, lse, scoring, state)
    (call,) = attention_calls(calls)
    assert plain(call.name) == "aclnnFlashAttentionScoreGrad"
    statistics = [argument for argument in call.tensors if argument.shape == (B, N, S, 8)]
    assert [argument.dtype for argument in statistics] == ["float32", "float32"]
    assert [(gradient.shape, gradient.dtype) for gradient in gradients] == [(value.shape, BF16) for value in (q, k, v)]


MODES = {  # sparse_mode, pre_tokens, next_tokens, inner_precise, pse_type, q_start_idx, kv_start_idx
    "causal": (2, NO_LIMIT, NO_LIMIT, 0, 1, None, None),
    "full": (0, NO_LIMIT, NO_LIMIT, 0, 1, None, None),
    "band": (4, 3, 0, 0, 1, None, None),
    "mask": (1, NO_LIMIT, NO_LIMIT, 2, 1, None, None),
    "alibi": (2, NO_LIMIT, NO_LIMIT, 0, 2, [0], [0]),
    "alibi-root": (0, NO_LIMIT, NO_LIMIT, 0, 3, [24], [8]),
    "alibi-signed": (2, NO_LIMIT, NO_LIMIT, 0, 0, None, None),
    "tensor": (1, NO_LIMIT, NO_LIMIT, 2, 0, None, None),
}


@npu_contract()
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", MODES)
def test_how_the_kernel_is_told_what_is_visible(calls, kind, dropout):
    """The same in both directions, for grouped heads, values of another size, with and without dropout."""
    from mindspeed.core.attention import Dropout, attend, attend_backward

    q, k, v = heads(N), heads(G), heads(G, dim=8)
    scoring = scoring_of(kind, dropout=Dropout(0.25, seed=11) if dropout else None)
    with arguments_of_kernels() as seen:
        out, lse, state = attend(q, k, v, scoring)
        gradients = attend_backward(out, q, k, v, out, lse, scoring, state)
    forward, backward = seen
    names = ("sparse_mode", "pre_tokens", "next_tokens", "inner_precise", "pse_type", "q_start_idx", "kv_start_idx")
    for options in seen:
        assert tuple(options[name] for name in names) == MODES[kind]
        assert options["keep_prob"] == (0.75 if dropout else 1.0)
    assert (forward["scale"], backward["scale_value"]) == (0.25, 0.25)
    numels = B * N * S * S
    assert state == ((11, 0, numels) if dropout else None)
    assert tuple(backward[name] for name in ("seed", "offset", "numels")) == (state or (0, 0, 0))
    assert [(gradient.shape, gradient.dtype) for gradient in gradients] == [(value.shape, BF16) for value in (q, k, v)]
    assert (out.shape, lse.shape) == ((B, N, S, 8), (B, N, S))


@npu_contract()
@pytest.mark.parametrize(
    ("past", "future", "shift", "queries", "keys", "expected"),
    [
        (3, 0, 0, 8, 8, (4, 3, 0, 0)),
        (5, 0, -4, 4, 8, (4, 5, 0, 0)),  # the last rows of a square: the corners coincide
        (5, 6, 0, 4, 8, (4, 9, 2, 0)),  # the band counts from the upper left corner, the kernel from the lower right
        (None, 0, 4, 8, 4, (4, NO_LIMIT, 0, 2)),  # the first rows see nothing
        (2, 0, 8, 8, 8, (1, NO_LIMIT, NO_LIMIT, 2)),  # beside the diagonal: a mask
    ],
)
def test_bands_of_tiles_that_are_not_square(calls, past, future, shift, queries, keys, expected):
    from mindspeed.core.attention import Scoring, Visibility, attend

    with arguments_of_kernels() as seen:
        attend(heads(N, queries), heads(G, keys), heads(G, keys), Scoring(0.25, Visibility(past, future, shift)))
    (options,) = seen
    assert tuple(options[name] for name in ("sparse_mode", "pre_tokens", "next_tokens", "inner_precise")) == expected


@npu_contract()
def test_slopes_of_a_tile_that_is_not_square_become_a_tensor(calls):
    """The kernel makes position biases for as many queries as keys only."""
    from mindspeed.core.attention import FULL, Scoring, attend
    from mindspeed.core.attention.bias import AlibiBias

    bias = AlibiBias(torch.ones(N, device="npu"), torch.arange(4) + 8, torch.arange(8))
    with arguments_of_kernels() as seen:
        attend(heads(N, 4), heads(G, 8), heads(G, 8), Scoring(0.25, FULL, bias))
    assert (seen[0]["pse_type"], seen[0]["q_start_idx"], tuple(seen[0]["pse"].shape)) == (0, None, (1, N, 4, 8))


@npu_contract()
def test_slopes_travel_as_they_are(calls):
    from mindspeed.core.attention import attend

    calls.reset()
    attend(heads(N), heads(G), heads(G), scoring_of("alibi"))
    (call,) = attention_calls(calls)
    assert [argument.shape for argument in call.tensors if argument.dtype == "float32"][0] == (N,)


@npu_contract()
def test_the_triangle_is_made_once(calls):
    from mindspeed.core.attention import attend
    from mindspeed.core.attention.dispatch import kernels_for

    q, k, v = heads(N), heads(N), heads(N)
    attend(q, k, v, scoring_of("causal"))
    calls.reset()
    attend(q, k, v, scoring_of("causal"))
    attend(q, k, v, scoring_of("band"))
    assert not [name for name in calls.names if "Triu" in name]
    assert [kernel.name for kernel in kernels_for("npu")] == ["npu-fusion", "math"]


@npu_contract()
def test_dropout_is_drawn_again_in_backward_from_the_seed_of_the_tile(calls):
    from mindspeed.core.attention import Dropout, attend, attend_backward

    generator = torch.npu.default_generators[0]
    generator.manual_seed(3)
    before = generator.get_state()
    q, k, v, scoring = heads(N), heads(N), heads(N), scoring_of("causal", dropout=Dropout(0.1, seed=11))
    calls.reset()
    out, lse, state = attend(q, k, v, scoring)
    assert state == (11, 0, B * N * S * S)
    assert [call.name for call in attention_calls(calls)].count("aclnnDropoutGenMaskV2") == 1
    calls.reset()
    attend_backward(out, q, k, v, out, lse, scoring, state)
    assert [call.name for call in attention_calls(calls)].count("aclnnDropoutGenMaskV2") == 1
    assert torch.equal(generator.get_state(), before)  # other users of the generator notice nothing


@npu_contract()
def test_fused_merge_is_one_kernel_in_float32(calls):
    from mindspeed.core.attention import Accumulator, attend, merge_fused

    q, k, v = heads(N), heads(N), heads(N)
    tiles = [attend(q, k, v, scoring_of("causal"))[:2] for _ in range(2)]
    half = attend(q[:, :, 4:], k, v, scoring_of("full"))[:2]
    total = Accumulator(q, D, merge_fused)
    total.add(*tiles[0])
    calls.reset()
    total.add(*tiles[1])
    total.add(*half, rows=slice(4, 8))
    whole, part = calls.named("aclnnRingAttentionUpdateV2")
    for call, length in ((whole, S), (part, 4)):
        assert [argument.shape for argument in call.tensors[:6]] == [(length, B, N * D), *[(B, N, length, 8)] * 2] * 2
        assert {argument.dtype for argument in call.tensors} == {"float32"}
    assert (total.out.shape, total.out.dtype, total.lse.shape) == ((B, N, S, D), torch.float32, (B, N, S))


@npu_contract()
def test_values_may_be_narrower(calls):
    from mindspeed.core.attention import attend, attend_backward

    q, k, v = heads(N), heads(N), heads(N, dim=8)
    for order in ("SBH", "BNSD"):
        scoring = scoring_of("causal", memory_order=order)
        out, lse, state = attend(q, k, v, scoring)
        assert out.shape == (B, N, S, 8)
        gradients = attend_backward(out, q, k, v, out, lse, scoring, state)
        assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@npu_contract()
def test_bad_or_empty_input_launches_no_attention(calls):
    from mindspeed.core.attention import attend

    q = heads(N)
    calls.reset()
    for k, match in ((heads(3), "multiple of 3"), (heads(N, dim=8), "do not fit"), (q[0], "must be")):
        with pytest.raises(ValueError, match=match):
            attend(q, k, k, scoring_of("full"))
    out, lse, _ = attend(q, heads(N, length=0), heads(N, length=0), scoring_of("full"))
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    assert attention_calls(calls) == []


@npu_contract()
def test_float64_is_served_by_plain_torch(calls):
    from mindspeed.core.attention.dispatch import choose, kernels_for

    q = torch.zeros(1, 1, 2, 4, dtype=torch.float64, device="npu")
    assert choose(q, q, q, scoring_of("full"), kernels_for("npu")).name == "math"


@npu_contract(fresh=True, load=False)
def test_the_kernel_does_not_import_torch_npu(calls):
    import sys

    from mindspeed.core.attention.dispatch import kernels_for

    assert kernels_for("npu")[0].name == "npu-fusion"
    assert "torch_npu" not in sys.modules
