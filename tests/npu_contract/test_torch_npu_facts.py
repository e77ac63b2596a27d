"""What torch_npu itself does with the operators that our NPU kernels call: kernels launched, gradients given or missing.

Our kernels rest on these facts; when a new torch_npu changes one, this file says which.
"""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

BF16 = torch.bfloat16
EVERYWHERE = (
    "aclnnInplaceOne",
    "aclnnInplaceZero",
    "aclnnInplaceCopy",
    "aclnnInplaceFillScalar",
    "aclnnReduceSum",
    "aclnnCast",
)


def tensor(*shape, dtype=BF16, grad=False):
    return torch.zeros(*shape, dtype=dtype, device="npu").requires_grad_(grad)


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype).to("npu")


def attention(version, layout, *, keep_prob=1.0, **options):
    import torch_npu

    shape = {"SBH": (8, 2, 64), "BNSD": (2, 4, 8, 16), "TND": (16, 4, 16)}[layout]
    q, k, v = (tensor(*shape, grad=True) for _ in range(3))
    function = {1: torch_npu.npu_fusion_attention, 2: torch_npu.npu_fusion_attention_v2}[version]
    return function(q, k, v, 4, layout, scale=0.25, keep_prob=keep_prob, **options)[0]


def token_permute():
    import torch_npu

    tokens = tensor(8, 16, grad=True)
    permuted, order = torch_npu.npu_moe_token_permute(tokens, torch.zeros(8, 2, dtype=torch.int32, device="npu"))
    return torch_npu.npu_moe_token_unpermute(permuted, order, tensor(8, 2, grad=True))


def token_permute_with_routing_map():
    import torch_npu

    tokens, probs = tensor(8, 16, grad=True), tensor(8, 4, grad=True)
    routing_map = torch.ones(8, 4, dtype=torch.bool, device="npu")
    permuted, _, order = torch_npu.npu_moe_token_permute_with_routing_map(tokens, routing_map, probs=probs, num_out_tokens=16)
    return torch_npu.npu_moe_token_unpermute_with_routing_map(permuted, order, (8, 16), probs=probs, routing_map=routing_map)


def ring_update(layout):
    import torch_npu

    out, stat = ((8, 2, 64), (2, 4, 8, 8)) if layout == "SBH" else ((16, 4, 64), (16, 4, 8))
    lengths = None if layout == "SBH" else ints(0, 8, 16)
    block = [tensor(*out), tensor(*stat, dtype=torch.float32), tensor(*stat, dtype=torch.float32)]
    return torch_npu.npu_ring_attention_update(*block, *block, actual_seq_qlen=lengths, input_layout=layout)[0]


def grouped_matmul(group_list):
    import torch_npu

    return torch_npu.npu_grouped_matmul(
        [tensor(6, 16)], [tensor(16, 8), tensor(16, 8)], group_list=group_list, split_item=3, group_type=0
    )[0]


def grouped_matmul_add():
    import torch_npu

    total = tensor(2, 16, 8, dtype=torch.float32)
    return torch_npu.npu_grouped_matmul_add_(total, tensor(6, 16), tensor(6, 8), ints(3, 6))


def fused_adamw():
    p, g, m, v = (tensor(8, dtype=torch.float32) for _ in range(4))
    torch._fused_adamw_(
        [p], [g], [m], [v], [], [tensor(1, dtype=torch.float32)],
        lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    return p


def call(name, *arguments, **options):
    import torch_npu

    result = getattr(torch_npu, name)(*arguments, **options)
    return result[0] if isinstance(result, tuple | list) else result


FORWARD_AND_BACKWARD = {
    "attention v1": (
        lambda: attention(1, "SBH"), ["aclnnFlashAttentionScore"], ["aclnnFlashAttentionScoreGrad"],
    ),
    "attention v2": (
        lambda: attention(2, "BNSD"), ["aclnnFlashAttentionScoreV2"], ["aclnnFlashAttentionScoreGradV2"],
    ),
    "attention v2 TND": (
        lambda: attention(2, "TND", actual_seq_qlen=[8, 16], actual_seq_kvlen=[8, 16]),
        ["aclnnFlashAttentionVarLenScoreV2"], ["aclnnFlashAttentionUnpaddingScoreGradV2"],
    ),
    "attention v1 dropout": (
        lambda: attention(1, "SBH", keep_prob=0.9),
        ["aclnnDropoutGenMaskV2", "aclnnFlashAttentionScore"], ["aclnnDropoutGenMaskV2", "aclnnFlashAttentionScoreGrad"],
    ),
    "rms_norm": (
        lambda: call("npu_rms_norm", tensor(4, 16, grad=True), tensor(16, grad=True)), ["aclnnRmsNorm"], ["aclnnRmsNormGrad"],
    ),
    "swiglu": (
        lambda: call("npu_swiglu", tensor(4, 16, grad=True)), ["aclnnSwiGlu"], ["aclnnSwiGluGrad"],
    ),
    "rotary_mul": (
        lambda: call("npu_rotary_mul", tensor(8, 2, 4, 16, grad=True), tensor(8, 1, 1, 16), tensor(8, 1, 1, 16)),
        ["aclnnRotaryPositionEmbeddingV2"], ["aclnnRotaryPositionEmbeddingGrad"],
    ),
    "scaled softmax": (
        lambda: call("npu_scaled_masked_softmax", tensor(2, 4, 32, 32, grad=True),
                     torch.zeros(2, 1, 32, 32, dtype=torch.bool, device="npu"), 0.5, False),
        ["ScaledMaskedSoftmax"], ["ScaledMaskedSoftmaxGrad"],
    ),
    "layer_norm": (
        lambda: torch.nn.functional.layer_norm(tensor(4, 16, grad=True), (16,), tensor(16, grad=True), tensor(16, grad=True)),
        ["aclnnLayerNorm"], ["aclnnLayerNormBackward"],
    ),
    "dropout": (
        lambda: torch.native_dropout(tensor(4, 16, grad=True), 0.5, True)[0],
        ["aclnnDropoutGenMaskV2", "aclnnDropoutDoMask"], ["aclnnDropoutDoMask"],
    ),
    "token permute": (
        token_permute,
        ["aclnnMoeTokenPermute", "aclnnMoeTokenUnpermute"], ["aclnnMoeTokenUnpermuteGrad", "aclnnMoeTokenPermuteGrad"],
    ),
    "token permute, map": (
        token_permute_with_routing_map,
        ["aclnnMoeTokenPermuteWithRoutingMap", "aclnnMoeTokenUnpermuteWithRoutingMap"],
        ["aclnnMoeTokenUnpermuteWithRoutingMapGrad", "aclnnMoeTokenPermuteWithRoutingMapGrad"],
    ),
}  # fmt: skip

FORWARD_ONLY = {
    "ring update SBH": (lambda: ring_update("SBH"), ["aclnnRingAttentionUpdateV2"]),
    "ring update TND": (lambda: ring_update("TND"), ["aclnnRingAttentionUpdateV2"]),
    "grouped_matmul": (lambda: grouped_matmul(ints(3, 6)), ["aclnnGroupedMatmulV5"]),
    "grouped_matmul, host list": (lambda: grouped_matmul([3, 6]), ["aclnnGroupedMatmul"]),
    "grouped_matmul_add_": (grouped_matmul_add, ["aclnnGroupedMatmulAdd"]),
    "_fused_adamw_": (fused_adamw, ["aclnnSubs", "aclnnApplyAdamWV2"]),
    "ffn": (lambda: call("npu_ffn", tensor(4, 16), tensor(16, 32), tensor(32, 16), "gelu"), ["aclnnFFNV2"]),
    "mm_all_reduce": (lambda: call("npu_mm_all_reduce_base", tensor(4, 16), tensor(16, 8), "hcom"), ["aclnnMatmulAllReduce"]),
    "all_gather_mm": (lambda: call("npu_all_gather_base_mm", tensor(4, 16), tensor(16, 8), "hcom", 2), ["aclnnAllGatherMatmul"]),
    "mm_reduce_scatter": (
        lambda: call("npu_mm_reduce_scatter_base", tensor(4, 16), tensor(16, 8), "hcom", 2), ["aclnnMatmulReduceScatter"],
    ),
    "add_rms_norm": (lambda: call("npu_add_rms_norm", tensor(4, 16), tensor(4, 16), tensor(16)), ["aclnnAddRmsNorm"]),
}  # fmt: skip


def launched(calls):
    return [name for name in calls.names if name not in EVERYWHERE]


@npu_contract()
@pytest.mark.parametrize("name", FORWARD_AND_BACKWARD)
def test_differentiable_operators(calls, name):
    run, forward, backward = FORWARD_AND_BACKWARD[name]
    result = run()
    assert launched(calls) == forward
    calls.reset()
    result.sum().backward()
    assert launched(calls) == backward


@npu_contract()
@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_forward_operators(calls, name):
    run, forward = FORWARD_ONLY[name]
    run()
    assert launched(calls) == forward
