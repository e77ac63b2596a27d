"""Attention and its merge on the NPU: kernels launched, shapes of results and statistics, gradients, dropout without kept masks."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

BF16, FP32 = torch.bfloat16, torch.float32
LAYOUTS = {"BSH": (2, 8, 64), "SBH": (8, 2, 64), "BSND": (2, 8, 4, 16), "BNSD": (2, 4, 8, 16), "TND": (16, 4, 16)}
PACKED = {"actual_seq_qlen": [6, 16], "actual_seq_kvlen": [6, 16]}


def tensor(*shape, dtype=BF16, grad=False):
    return torch.zeros(*shape, dtype=dtype, device="npu").requires_grad_(grad)


def attention(layout, **options):
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention

    inputs = [tensor(*LAYOUTS[layout], grad=True) for _ in range(3)]
    packed = PACKED if layout == "TND" else {}
    return inputs, npu_fusion_attention(*inputs, 4, layout, scale=0.25, **packed, **options)


def kernels(calls):
    return [name for name in calls.names if "FlashAttention" in name or "Dropout" in name]


@npu_contract()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward(calls, layout):
    inputs, (out, top, total, *_) = attention(layout)
    forward = "aclnnFlashAttentionVarLenScoreV2" if layout == "TND" else "aclnnFlashAttentionScoreV2"
    assert kernels(calls) == [forward]
    assert (out.shape, out.dtype) == (inputs[0].shape, BF16)
    assert top.shape == total.shape == ((16, 4, 8) if layout == "TND" else (2, 4, 8, 8))
    assert top.dtype == FP32
    calls.reset()
    out.backward(torch.zeros_like(out))
    backward = "aclnnFlashAttentionUnpaddingScoreGradV2" if layout == "TND" else "aclnnFlashAttentionScoreGradV2"
    assert [name.removesuffix("V3").removesuffix("V2") for name in kernels(calls)] == [backward.removesuffix("V2")]
    assert all(value.grad.shape == value.shape for value in inputs)


@npu_contract()
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_dropout_mask_is_made_again_in_backward_from_the_same_state(calls, layout):
    generator = torch.npu.default_generators[0]
    generator.manual_seed(11)
    generator.set_offset(40)
    _, (out, _, _, _, seed, offset, numels) = attention(layout, keep_prob=0.9)
    assert (seed, offset) == (11, 40)
    assert generator.get_offset() >= 40 + numels  # the next draw starts behind this one
    assert numels == (4 * (6 * 6 + 10 * 10) if layout == "TND" else 2 * 4 * 8 * 8)
    assert kernels(calls).count("aclnnDropoutGenMaskV2") == 1
    calls.reset()
    out.backward(torch.zeros_like(out))
    assert kernels(calls).count("aclnnDropoutGenMaskV2") == 1
    assert generator.get_offset() >= 40 + numels


@npu_contract()
def test_masks_and_position_bias(calls):
    mask = torch.zeros(8, 8, dtype=torch.bool, device="npu")
    pse = tensor(1, 4, 8, 8, grad=True)
    inputs, (out, *_) = attention("BNSD", atten_mask=mask, pse=pse, sparse_mode=0, next_tokens=0)
    (call,) = (call for call in calls if call.name == "aclnnFlashAttentionScoreV2")
    assert {(8, 8), (1, 4, 8, 8)} <= {argument.shape for argument in call.tensors}
    out.backward(torch.zeros_like(out))
    assert (pse.grad.shape, pse.grad.dtype) == (pse.shape, BF16)


@npu_contract()
def test_backward_takes_statistics_of_a_larger_set_of_keys(calls):
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention_grad

    q, k, v, dout, out = (tensor(2, 4, 8, 16) for _ in range(5))
    statistics = tensor(2, 4, 8, 8, dtype=FP32)
    calls.reset()
    dq, dk, dv, dpse = npu_fusion_attention_grad(
        q, k, v, dout, 4, "BNSD", softmax_max=statistics, softmax_sum=statistics, attention_in=out, scale=0.25
    )
    assert [name.removesuffix("V2") for name in kernels(calls)] == ["aclnnFlashAttentionScoreGrad"]
    assert (dq.shape, dk.shape, dv.shape, dpse) == (q.shape, k.shape, v.shape, None)


@npu_contract()
@pytest.mark.parametrize(("layout", "by_token"), [("SBH", False), ("TND", False), ("TND", True)])
def test_ring_update_is_one_kernel(calls, layout, by_token):
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update

    out, stat = ((8, 2, 64), (2, 4, 8, 8)) if layout == "SBH" else ((16, 4, 64), (16, 4, 8))
    block = [tensor(*out), tensor(*stat, dtype=FP32), tensor(*stat, dtype=FP32)]
    lengths = None if layout == "SBH" else torch.tensor([0, 6, 16]).to("npu")
    calls.reset()
    results = npu_ring_attention_update(*block, *block, lengths, layout, softmax_layout="TND" if by_token else "")
    assert calls.names == (["aclnnRingAttentionUpdateV2"])
    assert [(value.shape, value.dtype) for value in results] == [(out, BF16), (stat, FP32), (stat, FP32)]


@npu_contract()
def test_ring_update_of_other_head_sizes_is_the_plain_form(calls):
    from mindspeed.ops import backend_report
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update

    block = [tensor(16, 4, 48), tensor(16, 4, 8, dtype=FP32), tensor(16, 4, 8, dtype=FP32)]
    npu_ring_attention_update(*block, *block, None, "TND", softmax_layout="TND")
    assert backend_report("npu")["ring_attention_update"].kernel == "ref"


@npu_contract()
def test_bad_input_is_our_error_before_any_kernel(calls):
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update

    q, stat = tensor(2, 4, 8, 16), tensor(2, 4, 8, 8, dtype=FP32)
    calls.reset()
    for error, match, run in (
        (ValueError, "npu_fusion_attention: input_layout", lambda: npu_fusion_attention(q, q, q, 4, "NBSD")),
        (ValueError, "npu_fusion_attention: keep_prob", lambda: npu_fusion_attention(q, q, q, 4, "BNSD", keep_prob=0.0)),
        (ValueError, "npu_fusion_attention: query", lambda: npu_fusion_attention(q, q, q, 3, "BNSD")),
        (ValueError, "npu_fusion_attention: actual_seq_qlen", lambda: npu_fusion_attention(q[0], q[0], q[0], 8, "TND")),
        (
            ValueError,
            "npu_ring_attention_update: layout",
            lambda: npu_ring_attention_update(q, stat, stat, q, stat, stat, None, "B"),
        ),
    ):
        with pytest.raises(error, match=match):
            run()
    assert calls.names == []
