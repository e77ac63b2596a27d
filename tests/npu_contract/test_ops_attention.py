"""Attention and its merge on the NPU: kernels launched, shapes of results and statistics, gradients, dropout without kept masks."""

from __future__ import annotations

from unittest import mock

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
@pytest.mark.parametrize("keep_prob", [1.0, 0.75])
@pytest.mark.parametrize("mode", [2, 3, 4, 7, 8])
def test_documents_are_one_launch_each_way(calls, mode, keep_prob):
    """Packed sequences, one of them empty, grouped heads, values of another size, and the 2048 x 2048 triangle."""
    import torch_npu

    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention

    q, k, v = tensor(16, 4, 16, grad=True), tensor(16, 2, 16, grad=True), tensor(16, 2, 8, grad=True)
    triangle = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu_(1)
    ends = {"actual_seq_qlen": [6, 6, 16], "actual_seq_kvlen": [6, 6, 16]}
    options = {"sparse_mode": mode, "pre_tokens": 16, "next_tokens": 0, "atten_mask": triangle, "keep_prob": keep_prob}
    seen = []
    original = torch_npu.npu_fusion_attention_grad_v2

    def watched(*tensors, **given):
        seen.append(given)
        return original(*tensors, **given)

    calls.reset()
    out, top, total, _, seed, offset, numels = npu_fusion_attention(q, k, v, 4, "TND", scale=0.25, **ends, **options)
    mask = [] if keep_prob == 1.0 else ["aclnnDropoutGenMaskV2"]
    assert kernels(calls) == [*mask, "aclnnFlashAttentionVarLenScoreV2"]
    (call,) = (call for call in calls if "FlashAttention" in call.name)
    assert [argument.shape for argument in call.tensors[:3]] == [(16, 4, 16), (16, 2, 16), (16, 2, 8)]
    assert (2048, 2048) in [argument.shape for argument in call.tensors if argument.dtype == "bool"]
    assert call.int_lists.count((6, 6, 16)) == 2, call.int_lists
    assert (out.shape, top.shape, total.shape) == ((16, 4, 8), (16, 4, 8), (16, 4, 8))
    calls.reset()
    with mock.patch.object(torch_npu, "npu_fusion_attention_grad_v2", watched):
        out.backward(torch.zeros_like(out))
    assert [name.rstrip("V23") for name in kernels(calls)] == [
        *(name.rstrip("V2") for name in mask),
        "aclnnFlashAttentionUnpaddingScoreGrad",
    ]
    (given,) = seen
    assert (given["sparse_mode"], given["pre_tokens"], given["next_tokens"], given["softmax_layout"]) == (mode, 16, 0, "TND")
    expected = (seed, offset, numels) if mask else (0, 0, 0)
    assert (given["seed"], given["offset"], given["numels"]) == expected
    assert numels == (4 * (6 * 6 + 10 * 10) if mask else 0)
    assert [value.grad.shape for value in (q, k, v)] == [q.shape, k.shape, v.shape]


@npu_contract()
@pytest.mark.parametrize(
    ("layout", "shapes", "options", "reason"),
    [
        ("BNSD", ((2, 4, 8, 16), (2, 4, 8, 16)), {"dtype": torch.float64}, "has no float64"),
        ("BNSD", ((1, 257, 2, 8), (1, 257, 2, 8)), {}, "takes at most 256 heads, not 257"),
        ("SBH", ((2, 1, 784), (2, 1, 784)), {"heads": 1}, "takes head sizes up to 768, not 784"),
        ("BNSD", ((2, 4, 4, 16), (2, 4, 8, 16)), {"pse": (4,), "pse_type": 2}, "for as many queries as keys only"),
        ("TND", ((16, 4, 16), (16, 4, 16)), {"pse": (4,), "pse_type": 3, "ends": [8, 8, 16]}, "with empty sequences"),
    ],
)
def test_beyond_the_limits_of_the_kernel_both_directions_are_the_plain_form(calls, layout, shapes, options, reason):
    from mindspeed.ops import backend_report
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention

    dtype = options.get("dtype", BF16)
    q, k, v = (tensor(*shape, dtype=dtype, grad=True) for shape in (*shapes, shapes[1]))
    given = {"pse_type": options.get("pse_type", 1)}
    if "pse" in options:
        given["pse"] = tensor(*options["pse"], dtype=FP32)
    if "ends" in options:
        given |= {"actual_seq_qlen": options["ends"], "actual_seq_kvlen": options["ends"]}
    heads = options.get("heads", q.shape[1])
    out = npu_fusion_attention(q, k, v, heads, layout, **given)[0]
    out.backward(torch.zeros_like(out))
    for name in ("fusion_attention", "fusion_attention_backward"):
        report = backend_report("npu")[name]
        assert report.kernel == "ref" and reason in report.reason
    assert kernels(calls) == []


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
