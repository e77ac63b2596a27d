"""The attention kernel of context parallelism on NPU: what is launched per kind of tile, with which mask, shapes, gradients."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

BF16 = torch.bfloat16
B, N, G, S, D = 2, 4, 2, 8, 16


def heads(count, length=S, dim=D, dtype=BF16):
    """[B, heads, S, D] view of sequence-first memory, as the layers hand it over."""
    return torch.zeros(length, B, count, dim, dtype=dtype, device="npu").permute(1, 2, 0, 3)


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
