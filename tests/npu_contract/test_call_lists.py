"""The kernels of every operator on the NPU, forward and backward, in order: what a change of a body or of torch_npu would alter."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from mindspeed.testing.npu_contract import hccl_world, npu_contract
from tests.npu_contract import call_rows

# row of call_rows: (forward, backward or None, bodies); names without their "aclnn"
ROWS = {
    "rms_norm": (
        "RmsNorm",
        "RmsNormGrad InplaceCopy",
        "rms_norm=npu rms_norm_backward=npu",
    ),
    "rms_norm_wide_weight": (
        "InplaceCopy RmsNorm InplaceCopy",
        "InplaceCopy InplaceCopy RmsNormGrad InplaceCopy",
        "rms_norm=npu rms_norm_backward=npu",
    ),
    "layer_norm": (
        "LayerNorm",
        "LayerNormBackward InplaceCopy InplaceCopy",
        "layer_norm=aten layer_norm_backward=aten",
    ),
    "add_rms_norm": (
        "AddRmsNorm",
        "InplaceCopy InplaceCopy InplaceCopy RmsNormGrad InplaceCopy InplaceCopy InplaceCopy",
        "dropout_add_norm=npu dropout_add_norm_backward=npu",
    ),
    "dropout_add_rms_norm": (
        "InplaceCopy DropoutGenMaskV2 DropoutDoMask Add InplaceCopy RmsNorm InplaceCopy InplaceCopy",
        (
            "InplaceCopy InplaceCopy InplaceCopy RmsNormGrad DropoutGenMaskV2 DropoutDoMask InplaceCopy "
            "InplaceCopy InplaceCopy"
        ),
        "dropout_add_norm=npu dropout_add_norm_backward=npu",
    ),
    "dropout_add_layer_norm": (
        (
            "InplaceCopy DropoutGenMaskV2 DropoutDoMask Add InplaceCopy InplaceCopy LayerNorm InplaceCopy "
            "InplaceCopy"
        ),
        (
            "InplaceCopy InplaceCopy InplaceCopy InplaceZero LayerNormBackward DropoutGenMaskV2 DropoutDoMask "
            "InplaceCopy InplaceCopy InplaceCopy ReduceSum InplaceCopy"
        ),
        "dropout_add_norm=npu dropout_add_norm_backward=npu",
    ),
    "dropout_mask": (
        (
            "InplaceCopy DropoutGenMaskV2 DropoutDoMask InplaceCopy InplaceCopy LayerNorm InplaceCopy InplaceCopy "
            "InplaceOne DropoutGenMaskV2 DropoutDoMask NeScalar"
        ),
        None,
        "dropout_add_norm=npu dropout_mask=npu",
    ),
    "rotary": (
        "RotaryPositionEmbeddingV2",
        "Neg Neg Cat RotaryPositionEmbeddingV2",
        "rotary=npu rotary_backward=npu",
    ),
    "rotary_interleaved": (
        "RotaryPositionEmbeddingV2",
        "Neg Neg Stack RotaryPositionEmbeddingV2",
        "rotary=npu rotary_backward=npu",
    ),
    "rotary_tables": (
        "RotaryPositionEmbeddingV2",
        "RotaryPositionEmbeddingGrad",
        "rotary=npu rotary_backward=npu",
    ),
    "swiglu": (
        "SwiGlu",
        "SwiGluGrad",
        "swiglu=npu swiglu_backward=npu",
    ),
    "bias_swiglu": (
        "InplaceCopy Add SwiGlu InplaceCopy",
        "InplaceCopy InplaceCopy Add SwiGluGrad InplaceCopy ReduceSum InplaceCopy",
        "bias_swiglu=npu bias_swiglu_backward=npu",
    ),
    "weighted_swiglu": (
        "InplaceCopy SwiGlu InplaceMul InplaceCopy",
        "InplaceCopy InplaceCopy Mul SwiGluGrad SwiGlu InplaceMul ReduceSum InplaceCopy",
        "swiglu_weighted=npu swiglu_weighted_backward=npu",
    ),
    "softmax_causal": (
        "InplaceOne InplaceTriu ScaledMaskedSoftmax",
        "InplaceZero ScaledMaskedSoftmaxGrad",
        "scaled_masked_softmax=npu scaled_masked_softmax_backward=npu",
    ),
    "softmax_masked": (
        "ScaledMaskedSoftmax All InplaceMaskedFillScalar",
        "InplaceZero ScaledMaskedSoftmaxGrad",
        "scaled_masked_softmax=npu scaled_masked_softmax_backward=npu",
    ),
    "cross_entropy": (
        (
            "Subs GeScalar LtScalar BitwiseAndTensor BitwiseNot InplaceCopy InplaceMaskedFillScalar InplaceCopy Amax "
            "InplaceCopy Gather InplaceCopy EqScalar InplaceCopy InplaceMaskedFillScalar Sub InplaceExp ReduceSum "
            "InplaceCopy BitwiseNot InplaceMaskedFillScalar Log Sub Sub EqScalar InplaceMaskedFillScalar Stack"
        ),
        (
            "Subs GeScalar LtScalar BitwiseAndTensor BitwiseNot InplaceCopy InplaceMaskedFillScalar EqScalar "
            "InplaceCopy InplaceMaskedFillScalar InplaceCopy InplaceCopy Sub InplaceExp InplaceDiv Gather Sub "
            "InplaceScatter InplaceMul InplaceCopy"
        ),
        "vocab_parallel_cross_entropy=npu vocab_parallel_cross_entropy_backward=npu",
    ),
    "cross_entropy_split": (
        (
            "Subs GeScalar LtScalar BitwiseAndTensor BitwiseNot InplaceCopy InplaceMaskedFillScalar InplaceCopy Amax "
            "InplaceCopy Gather InplaceCopy EqScalar InplaceCopy InplaceMaskedFillScalar Sub InplaceExp ReduceSum "
            "InplaceCopy BitwiseNot InplaceMaskedFillScalar InplaceCopy HcclAllReduce Sub Exp Mul Stack HcclAllReduce "
            "Log Sub Sub EqScalar InplaceMaskedFillScalar Stack"
        ),
        (
            "Subs GeScalar LtScalar BitwiseAndTensor BitwiseNot InplaceCopy InplaceMaskedFillScalar EqScalar "
            "InplaceCopy InplaceMaskedFillScalar InplaceCopy InplaceCopy Sub InplaceExp InplaceDiv Gather Sub "
            "InplaceScatter InplaceMul InplaceCopy"
        ),
        "vocab_parallel_cross_entropy=npu vocab_parallel_cross_entropy_backward=npu",
    ),
    "attention": (
        "FlashAttentionScoreV2",
        "FlashAttentionScoreGradV2",
        "fusion_attention=npu fusion_attention_backward=npu",
    ),
    "attention_dropout": (
        "DropoutGenMaskV2 FlashAttentionScoreV2",
        "DropoutGenMaskV2 FlashAttentionScoreGradV2",
        "fusion_attention=npu fusion_attention_backward=npu",
    ),
    "attention_packed": (
        (
            "FlashAttentionVarLenScoreV2 Clamp Cumsum Clamp InplaceFillScalar Cat InplaceZero Cat Sub Arange "
            "Arange SearchSorted Index Sub Index Muls Mul Add Add Sub IndexPutImpl IndexPutImpl"
        ),
        "FlashAttentionUnpaddingScoreGradV2",
        "fusion_attention=npu fusion_attention_backward=npu",
    ),
    "ring_update": (
        "RingAttentionUpdateV2",
        None,
        "ring_attention_update=npu",
    ),
    "ring_update_packed": (
        "RingAttentionUpdateV2",
        None,
        "ring_attention_update=npu",
    ),
    "gmm": (
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar",
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar GroupedMatmulV5",
        "gmm=npu gmm_backward=npu",
    ),
    "gmm_bias": (
        "GroupedMatmulV5 Arange Cumsum GeTensor InplaceMaskedFillScalar",
        (
            "GroupedMatmulV5 Arange Cumsum GeTensor InplaceMaskedFillScalar GroupedMatmulV5 Cumsum Arange "
            "SearchSorted InplaceZero InplaceCopy IndexAdd"
        ),
        "gmm=npu gmm_backward=npu",
    ),
    "gmm_list": (
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar",
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar GroupedMatmulV5",
        "gmm=npu gmm_backward=npu",
    ),
    "gmm_inner": (
        "GroupedMatmulV5",
        None,
        "gmm=npu",
    ),
    "gmm_fused_accumulation": (
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar",
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar GroupedMatmulAdd",
        "groupmatmul_add_=npu gmm=npu gmm_backward=npu",
    ),
    "matmul_add": (
        "InplaceFillScalar GroupedMatmulAdd",
        None,
        "matmul_add_=npu",
    ),
    "groupmatmul_add": (
        "GroupedMatmulAdd",
        None,
        "groupmatmul_add_=npu",
    ),
    "quant_gmm": (
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar",
        None,
        "quant_gmm=npu",
    ),
    "weight_quant_gmm": (
        "GroupedMatmulV5 Arange GeTensor InplaceMaskedFillScalar",
        None,
        "weight_quant_gmm=npu",
    ),
    "ffn": (
        "FFNV2",
        None,
        "ffn=npu",
    ),
    "permute": (
        "MoeTokenPermute",
        "InplaceZero MoeTokenPermuteGrad",
        "moe_token_permute=npu moe_token_permute_backward=npu",
    ),
    "permute_dropping": (
        "MoeTokenPermute",
        (
            "InplaceZero InplaceCopy GeScalar LtScalar BitwiseAndTensor InplaceFillScalar SWhere Arange "
            "RepeatInterleaveInt InplaceZero InplaceScatter InplaceCopy InplaceZero IndexAdd InplaceCopy"
        ),
        "moe_token_permute=npu moe_token_permute_backward=npu",
    ),
    "unpermute": (
        "MoeTokenUnpermute",
        "MoeTokenUnpermuteGrad",
        "moe_token_unpermute=npu moe_token_unpermute_backward=npu",
    ),
    "unpermute_top_1": (
        "MoeTokenUnpermute",
        "MoeTokenUnpermuteGrad",
        "moe_token_unpermute=npu moe_token_unpermute_backward=npu",
    ),
    "permute_map": (
        (
            "InplaceFillScalar InplaceCopy InplaceCopy Cumsum Subs InplaceCopy LtScalar BitwiseAndTensor "
            "InplaceFillScalar SWhere InplaceZero Arange InplaceScatter FloorDivides RemainderTensorScalar "
            "InplaceFillScalar SWhere InplaceCopy Index IndexSelect"
        ),
        (
            "InplaceCopy GeScalar LtScalar BitwiseAndTensor InplaceFillScalar SWhere Arange RepeatInterleaveInt "
            "InplaceZero InplaceScatter InplaceCopy InplaceZero IndexAdd InplaceCopy InplaceZero Cat InplaceCopy "
            "GeScalar LtScalar BitwiseAndTensor InplaceFillScalar SWhere Index"
        ),
        "moe_permute_map=ref moe_permute_map_backward=npu",
    ),
    "unpermute_map": (
        (
            "InplaceCopy GeScalar LtScalar BitwiseAndTensor InplaceFillScalar SWhere Arange RepeatInterleaveInt "
            "InplaceZero InplaceScatter InplaceCopy InplaceZero InplaceScatter Mul InplaceZero IndexAdd "
            "InplaceCopy"
        ),
        (
            "InplaceCopy GeScalar LtScalar BitwiseAndTensor InplaceFillScalar SWhere Arange RepeatInterleaveInt "
            "InplaceZero InplaceScatter InplaceFillScalar InplaceZero InplaceScatter IndexSelect InplaceCopy Mul "
            "InplaceZero InplaceScatter Mul InplaceCopy Mul ReduceSum InplaceZero Cat Index InplaceCopy"
        ),
        "moe_token_unpermute=npu moe_token_unpermute_backward=npu",
    ),
    "sort_chunks": (
        "Cumsum Sub Index Cumsum Arange SearchSorted Clamp Index Index Add Sub Index Sub IndexSelect",
        (
            "Index Sort Cumsum Sub Index Cumsum Arange SearchSorted Clamp Index Index Add Sub Index Sub "
            "IndexSelect"
        ),
        "sort_chunks=ref",
    ),
    "adamw": (
        "Subs ApplyAdamWV2",
        None,
        "adamw_=npu",
    ),
    "adamw_amsgrad": (
        "Subs ApplyAdamWV2",
        None,
        "adamw_=npu",
    ),
    "ema_adamw": (
        "InplaceCopy Subs ApplyAdamWV2 InplaceLerps",
        None,
        "ema_adamw_=npu",
    ),
    "ema_adam": (
        "InplaceCopy Subs ApplyAdamWV2 InplaceLerps",
        None,
        "ema_adamw_=npu",
    ),
    "mm_all_reduce_add_rms_norm": (
        "MatmulAllReduce AddRmsNorm",
        None,
        "mm_all_reduce_add_rms_norm=npu",
    ),
    "mm_all_reduce_add_rms_norm_in_place": (
        "MatmulAllReduce AddRmsNorm InplaceCopy",
        None,
        "mm_all_reduce_add_rms_norm_=npu",
    ),
    "grouped_mat_mul_all_reduce": (
        "GroupedMatmulV5 Cat HcclAllReduce InplaceCopy InplaceCopy",
        None,
        "grouped_mat_mul_all_reduce=npu",
    ),
    "alltoall_allgather_bmm": (
        "HcclAlltoAll HcclAllGather InplaceCopy Baddbmm Gelu",
        None,
        "npu_alltoall_allgather_bmm=npu",
    ),
    "bmm_reducescatter_alltoall": (
        "BatchMatMul InplaceCopy HcclReduceScatter Add InplaceCopy HcclAlltoAll",
        None,
        "npu_bmm_reducescatter_alltoall=npu",
    ),
    "coc_matmul_all_reduce": (
        "MatmulAllReduce InplaceCopy",
        None,
        "coc_matmul_all_reduce_=npu",
    ),
    "coc_all_gather_matmul": (
        "AllGatherMatmul InplaceCopy InplaceCopy",
        None,
        "coc_all_gather_matmul_=npu",
    ),
    "coc_matmul_reduce_scatter": (
        "MatmulReduceScatter InplaceCopy",
        None,
        "coc_matmul_reduce_scatter_=npu",
    ),
}  # fmt: skip


def launched(calls):
    torch.npu.synchronize()
    return " ".join(name.removeprefix("aclnn") for name in calls.names)


def differentiable(result):
    results = result if isinstance(result, tuple) else (result,)
    return [value for value in results if isinstance(value, torch.Tensor) and value.requires_grad]


def run(calls, name):
    """Kernels of forward, of backward if there is one, and which bodies ran."""
    from mindspeed.ops._registry import REGISTRY

    call = getattr(call_rows, name)()
    for operator in REGISTRY.operators.values():
        operator.last.clear()
    calls.reset()
    outputs = differentiable(call())
    forward, backward = launched(calls), None
    if outputs:
        gradients = [torch.empty_like(value) for value in outputs]
        calls.reset()
        torch.autograd.backward(outputs, gradients)
        backward = launched(calls)
    ran = {name: operator.last["npu"].kernel for name, operator in REGISTRY.operators.items() if "npu" in operator.last}
    return forward, backward, ran


@npu_contract()
@pytest.mark.parametrize("name", ROWS)
def test_kernels_of_a_call(calls, name):
    from mindspeed.ops import npu_matmul_add  # noqa: F401
    from mindspeed.ops._registry import REGISTRY

    REGISTRY.load("matmul_add", "npu")
    from mindspeed.ops.kernels.npu import matmul_add

    forward, backward, bodies = ROWS[name]
    with hccl_world(2), mock.patch.object(matmul_add, "atb_product", lambda: None):  # ATB kernels cannot run here
        found = run(calls, name)
    assert found[0] == forward
    assert found[1] == backward
    assert found[2] == dict(item.split("=") for item in bodies.split())


@npu_contract()
def test_every_operator_has_a_row(calls):
    import importlib
    import pkgutil

    import mindspeed.ops
    from mindspeed.ops._registry import REGISTRY

    for info in pkgutil.iter_modules(mindspeed.ops.__path__, "mindspeed.ops."):
        if not info.name.endswith("kernels"):
            importlib.import_module(info.name)
    covered = {item.split("=")[0] for _, _, bodies in ROWS.values() for item in bodies.split()}
    assert covered == set(REGISTRY.operators)


def test_every_row_is_expected():
    makers = {name for name, value in vars(call_rows).items() if callable(value) and value.__module__ == call_rows.__name__}
    assert set(ROWS) == makers - {"t", "g", "ints", "group"}
