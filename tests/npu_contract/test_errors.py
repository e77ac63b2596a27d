"""Bad input to any operator on the NPU is our error, with the operator's name, before any kernel or collective.

torch_npu lets much of it through to the device. One table for all operators: a wrong shape, dtype, option and device each.
"""

from __future__ import annotations

import pytest

from mindspeed.ops._registry import FAMILIES
from mindspeed.testing.npu_contract import hccl_world, npu_contract
from tests.npu_contract.bad_products import (
    all_gather_matmul_v2,
    matmul_all_reduce,
    matmul_reduce_scatter,
    npu_alltoall_allgather_bmm,
    npu_bmm_reducescatter_alltoall,
    npu_ffn,
    npu_grouped_mat_mul_all_reduce,
    npu_mm_all_reduce_add_rms_norm,
    npu_mm_all_reduce_add_rms_norm_,
    npu_quant_gmm,
    npu_quant_gmm_v2,
    npu_weight_quant_gmm,
    npu_weight_quant_gmm_v2,
    scaled_masked_softmax,
)
from tests.npu_contract.bad_tensors import (
    bias_swiglu,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm,
    moe_permute,
    moe_unpermute,
    npu_apply_fused_adamw_v2,
    npu_apply_fused_ema_adamw,
    npu_fusion_attention,
    npu_fusion_attention_grad,
    npu_gmm,
    npu_gmm_v2,
    npu_groupmatmul_add_fp32,
    npu_matmul_add_fp16,
    npu_matmul_add_fp32,
    npu_moe_token_permute,
    npu_moe_token_unpermute,
    npu_ring_attention_update,
    npu_rotary_position_embedding,
    rms_norm,
    sort_chunks,
    swiglu,
    vocab_parallel_cross_entropy,
    weighted_swiglu,
)

OPERATORS = {  # family: its public operators
    "adamw": (npu_apply_fused_adamw_v2,),
    "alltoall_allgather_bmm": (npu_alltoall_allgather_bmm,),
    "bmm_reducescatter_alltoall": (npu_bmm_reducescatter_alltoall,),
    "coc_ops": (matmul_all_reduce, all_gather_matmul_v2, matmul_reduce_scatter),
    "cross_entropy": (vocab_parallel_cross_entropy,),
    "dropout_add_norm": (dropout_add_layer_norm, dropout_add_rms_norm),
    "ema_adamw": (npu_apply_fused_ema_adamw,),
    "ffn": (npu_ffn,),
    "fusion_attention": (npu_fusion_attention, npu_fusion_attention_grad),
    "gmm": (npu_gmm, npu_gmm_v2),
    "grouped_mat_mul_all_reduce": (npu_grouped_mat_mul_all_reduce,),
    "groupmatmul_add": (npu_groupmatmul_add_fp32,),
    "layer_norm": (layer_norm,),
    "matmul_add": (npu_matmul_add_fp32, npu_matmul_add_fp16),
    "mm_all_reduce_add_rms_norm": (npu_mm_all_reduce_add_rms_norm, npu_mm_all_reduce_add_rms_norm_),
    "moe_token_permute": (npu_moe_token_permute, npu_moe_token_unpermute, moe_permute, moe_unpermute),
    "quant_gmm": (npu_quant_gmm, npu_quant_gmm_v2),
    "ring_attention_update": (npu_ring_attention_update,),
    "rms_norm": (rms_norm,),
    "rotary": (npu_rotary_position_embedding,),
    "scaled_masked_softmax": (scaled_masked_softmax,),
    "sort_chunks": (sort_chunks,),
    "swiglu": (swiglu, bias_swiglu, weighted_swiglu),
    "weight_quant_gmm": (npu_weight_quant_gmm, npu_weight_quant_gmm_v2),
}
CASES = {case.__name__: case for cases in OPERATORS.values() for case in cases}


def test_no_family_is_left_out():
    assert set(OPERATORS) == set(FAMILIES)


@npu_contract()
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_our_error_before_any_kernel(calls, name):
    kinds = set()
    with hccl_world():
        for error, argument, call in CASES[name]():
            calls.reset()
            with pytest.raises(error) as caught:
                call()
            operator, _, text = str(caught.value).partition(": ")
            # an in-place form may share a check, and the name in its text, with the other form
            wanted = name.removeprefix("npu_").rstrip("_")
            assert operator.replace(" ", "_").removeprefix("npu_").rstrip("_") == wanted, str(caught.value)
            assert text.startswith(argument), str(caught.value)
            assert calls.names == [], str(caught.value)
            kinds.add(error)
    assert {ValueError, TypeError} <= kinds
