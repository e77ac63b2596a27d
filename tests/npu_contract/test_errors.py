"""Bad input to any operator on the NPU is our error, with the operator's name, before any kernel or collective.

torch_npu lets much of it through to the device. One table for all operators: a wrong shape, dtype, option and device each.
"""

from __future__ import annotations

import pytest
import torch

from mindspeed.ops._registry import FAMILIES
from mindspeed.testing.npu_contract import hccl_world, npu_contract

BF16, FP16, FP32, INT8, INT32, INT64, BOOL = (
    torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def t(*shape, dtype=BF16, device="npu"):
    return torch.empty(*shape, dtype=dtype, device=device)


def f32(*shape):
    return t(*shape, dtype=FP32)


def i64(*shape):
    return t(*shape, dtype=INT64)


def i8(*shape):
    return t(*shape, dtype=INT8)


def host(*shape, dtype=BF16):
    return t(*shape, dtype=dtype, device="cpu")


def rms_norm():
    from mindspeed.ops.rms_norm import rms_norm as op

    yield ValueError, "gamma", lambda: op(t(4, 16), t(8))
    yield TypeError, "x", lambda: op(t(4, 16, dtype=INT32), t(16))
    yield ValueError, "epsilon", lambda: op(t(4, 16), t(16), -1.0)
    yield RuntimeError, "gamma", lambda: op(t(4, 16), host(16))


def layer_norm():
    from mindspeed.ops.layer_norm import layer_norm as op

    yield ValueError, "weight", lambda: op(t(4, 16), t(8), None)
    yield TypeError, "x", lambda: op(t(4, 16, dtype=INT32), t(16), None)
    yield ValueError, "eps", lambda: op(t(4, 16), t(16), None, -1.0)
    yield RuntimeError, "bias", lambda: op(t(4, 16), t(16), host(16))


def dropout_add_layer_norm():
    from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm as op

    yield from dropout_add_norm(op)


def dropout_add_rms_norm():
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm as op

    yield from dropout_add_norm(op)


def dropout_add_norm(op):
    x = t(2, 4, 16)
    yield ValueError, "weight", lambda: op(x, None, t(8), None, 0.1, 1e-5)
    yield ValueError, "residual", lambda: op(x, t(2, 4, 8), t(16), None, 0.1, 1e-5)
    yield TypeError, "weight", lambda: op(x, None, t(16, dtype=FP16), None, 0.1, 1e-5)
    yield ValueError, "dropout_p", lambda: op(x, None, t(16), None, 1.5, 1e-5)
    yield RuntimeError, "residual", lambda: op(x, host(2, 4, 16), t(16), None, 0.1, 1e-5)


def npu_rotary_position_embedding():
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding as op

    yield ValueError, "cos", lambda: op(t(8, 2, 4, 15), t(8, 1, 1, 15), t(8, 1, 1, 15))
    yield ValueError, "x", lambda: op(t(8, 4, 16), t(8, 1, 1, 16), t(8, 1, 1, 16))
    yield TypeError, "x", lambda: op(t(8, 2, 4, 16, dtype=INT32), t(8, 1, 1, 16), t(8, 1, 1, 16))
    yield ValueError, "mode", lambda: op(t(8, 2, 4, 16), t(8, 1, 1, 16), t(8, 1, 1, 16), 2)
    yield RuntimeError, "cos", lambda: op(t(8, 2, 4, 16), host(8, 1, 1, 16), host(8, 1, 1, 16))


def swiglu():
    from mindspeed.ops.swiglu import swiglu as op

    yield ValueError, "x", lambda: op(t(4, 15))
    yield TypeError, "x", lambda: op(t(4, 16, dtype=INT32))
    yield ValueError, "dim", lambda: op(t(4, 16), 2)


def bias_swiglu():
    from mindspeed.ops.swiglu import bias_swiglu as op

    yield ValueError, "bias", lambda: op(t(4, 16), t(8))
    yield TypeError, "x", lambda: op(t(4, 16, dtype=INT32), t(16))
    yield RuntimeError, "bias", lambda: op(t(4, 16), host(16))


def weighted_swiglu():
    from mindspeed.ops.swiglu import weighted_swiglu as op

    yield ValueError, "weights", lambda: op(t(4, 16), t(3, 1))
    yield TypeError, "x", lambda: op(t(4, 16, dtype=INT32), t(4, 1))
    yield RuntimeError, "weights", lambda: op(t(4, 16), host(4, 1))


def npu_fusion_attention():
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention as op

    q = t(2, 4, 8, 16)
    yield ValueError, "head_num", lambda: op(q, t(2, 3, 8, 16), t(2, 3, 8, 16), 4, "BNSD")
    yield ValueError, "key", lambda: op(q, t(2, 4, 8, 8), t(2, 4, 8, 8), 4, "BNSD")
    yield ValueError, "query", lambda: op(q, q, q, 3, "BNSD")
    yield TypeError, "query", lambda: op(t(2, 4, 8, 16, dtype=INT32), q, q, 4, "BNSD")
    yield TypeError, "key", lambda: op(q, f32(2, 4, 8, 16), q, 4, "BNSD")
    yield ValueError, "input_layout", lambda: op(q, q, q, 4, "NBSD")
    yield ValueError, "keep_prob", lambda: op(q, q, q, 4, "BNSD", keep_prob=0.0)
    yield ValueError, "sparse_mode", lambda: op(q, q, q, 4, "BNSD", sparse_mode=9)
    yield ValueError, "pse_type", lambda: op(q, q, q, 4, "BNSD", pse_type=4)
    yield ValueError, "actual_seq_qlen", lambda: op(q[0], q[0], q[0], 8, "TND")
    yield RuntimeError, "key", lambda: op(q, host(2, 4, 8, 16), q, 4, "BNSD")


def npu_fusion_attention_grad():
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention_grad as op

    q, stat = t(2, 4, 8, 16), f32(2, 4, 8, 8)
    given = {"softmax_max": stat, "softmax_sum": stat, "attention_in": q}
    yield ValueError, "grad_outputs", lambda: op(q, q, q, t(2, 4, 8, 8), 4, "BNSD", **given)
    yield ValueError, "softmax_max", lambda: op(q, q, q, q, 4, "BNSD", **(given | {"softmax_max": f32(2, 4, 8)}))
    yield TypeError, "softmax_max", lambda: op(q, q, q, q, 4, "BNSD", **(given | {"softmax_max": t(2, 4, 8, 8)}))
    yield ValueError, "input_layout", lambda: op(q, q, q, q, 4, "NBSD", **given)
    yield RuntimeError, "grad_outputs", lambda: op(q, q, q, host(2, 4, 8, 16), 4, "BNSD", **given)


def npu_ring_attention_update():
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update as op

    out, stat = t(8, 2, 64), f32(2, 4, 8, 8)
    block = (out, stat, stat)
    yield ValueError, "cur_softmax_max", lambda: op(*block, out, f32(2, 4, 7, 8), stat)
    yield TypeError, "prev_softmax_max", lambda: op(out, t(2, 4, 8, 8), stat, *block)
    yield ValueError, "layout", lambda: op(*block, *block, None, "B")
    yield RuntimeError, "cur_attn_out", lambda: op(*block, host(8, 2, 64), stat, stat)


def npu_gmm():
    from mindspeed.ops.gmm import npu_gmm as op

    x, weight = t(8, 16), t(2, 16, 32)
    yield ValueError, "weight", lambda: op(x, t(2, 8, 32), group_list=[3, 8])
    yield ValueError, "group_list", lambda: op(x, weight, group_list=[5, 3])
    yield ValueError, "group_list", lambda: op(x, weight, group_list=[3, 9])
    yield TypeError, "group_list", lambda: op(x, weight, group_list=host(2, dtype=INT32))
    yield TypeError, "weight", lambda: op(x, f32(2, 16, 32), group_list=[3, 8])
    yield ValueError, "group_type", lambda: op(x, weight, group_list=[3, 8], group_type=1)
    yield RuntimeError, "weight", lambda: op(x, host(2, 16, 32), group_list=i64(2))


def npu_gmm_v2():
    from mindspeed.ops.gmm import npu_gmm_v2 as op

    yield ValueError, "bias", lambda: op(t(8, 16), t(2, 16, 32), bias=f32(2, 16), group_list=i64(2))
    yield TypeError, "bias", lambda: op(t(8, 16), t(2, 16, 32), bias=t(2, 32), group_list=i64(2))
    yield ValueError, "original_weight", lambda: op(t(8, 16), t(2, 16, 32), group_list=i64(2), gemm_fusion=True)


def npu_matmul_add_fp32():
    from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32 as op

    yield ValueError, "grad", lambda: op(t(8, 16), t(8, 32), f32(16, 32))
    yield ValueError, "grad", lambda: op(t(8, 16), t(8, 32), f32(16, 32).t())
    yield TypeError, "grad", lambda: op(t(8, 16), t(8, 32), t(32, 16))
    yield RuntimeError, "grad", lambda: op(t(8, 16), t(8, 32), host(32, 16, dtype=FP32))


def npu_matmul_add_fp16():
    from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16 as op

    yield ValueError, "grad", lambda: op(t(8, 16), t(8, 32), t(16, 32))
    yield TypeError, "grad", lambda: op(t(8, 16), t(8, 32), f32(32, 16))


def npu_groupmatmul_add_fp32():
    from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32 as op

    yield ValueError, "grad", lambda: op(t(8, 16), t(8, 32), i64(2), f32(16, 32))
    yield TypeError, "dy", lambda: op(t(8, 16), f32(8, 32), i64(2), f32(2, 16, 32))
    yield TypeError, "grouplist", lambda: op(t(8, 16), t(8, 32), t(2, dtype=INT32), f32(2, 16, 32))
    yield RuntimeError, "grad", lambda: op(t(8, 16), t(8, 32), i64(2), host(2, 16, 32, dtype=FP32))


def npu_moe_token_permute():
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute as op

    yield ValueError, "indices", lambda: op(t(8, 16), i64(7, 2))
    yield TypeError, "indices", lambda: op(t(8, 16), t(8, 2))
    yield NotImplementedError, "padded_mode", lambda: op(t(8, 16), i64(8, 2), padded_mode=True)
    yield RuntimeError, "indices", lambda: op(t(8, 16), host(8, 2, dtype=INT64))


def npu_moe_token_unpermute():
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute as op

    order = t(16, dtype=INT32)
    yield ValueError, "probs", lambda: op(t(16, 16), order, f32(7, 2))
    yield TypeError, "sorted_indices", lambda: op(t(16, 16), i64(16))
    yield NotImplementedError, "padded_mode", lambda: op(t(16, 16), order, padded_mode=True)
    yield RuntimeError, "sorted_indices", lambda: op(t(16, 16), host(16, dtype=INT32))


def moe_permute():
    from mindspeed.ops.moe_routing_map import permute as op

    yield ValueError, "routing_map", lambda: op(t(8, 16), t(7, 4, dtype=BOOL), num_out_tokens=8)
    yield TypeError, "routing_map", lambda: op(t(8, 16), t(8, 4), num_out_tokens=8)
    yield RuntimeError, "routing_map", lambda: op(t(8, 16), host(8, 4, dtype=BOOL), num_out_tokens=8)


def moe_unpermute():
    from mindspeed.ops.moe_routing_map import DESTINATION, RowMap
    from mindspeed.ops.moe_routing_map import unpermute as op

    row_map = RowMap(DESTINATION, t(8, 4, dtype=INT32))
    yield ValueError, "restore_shape", lambda: op(t(16, 16), row_map, (7, 16))
    yield ValueError, "probs", lambda: op(t(16, 16), row_map, (8, 16), f32(8, 3))
    yield TypeError, "row_map", lambda: op(t(16, 16), RowMap("source", row_map.tensor), (8, 16))


def sort_chunks():
    from mindspeed.ops.sort_chunks import sort_chunks as op

    yield ValueError, "order", lambda: op(t(8, 16), i64(3), i64(2))
    yield TypeError, "split_sizes", lambda: op(t(8, 16), t(2), i64(2))


def npu_apply_fused_adamw_v2():
    from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2 as op

    p, step = f32(4), i64(1)
    yield ValueError, "grad", lambda: op(p, f32(5), p, p, None, step)
    yield TypeError, "exp_avg", lambda: op(p, p, t(4, dtype=FP16), p, None, step)
    yield ValueError, "max_exp_avg_sq", lambda: op(p, p, p, p, f32(5), step, amsgrad=True)
    yield TypeError, "max_exp_avg_sq", lambda: op(p, p, p, p, None, step, amsgrad=True)
    yield RuntimeError, "grad", lambda: op(p, host(4, dtype=FP32), p, p, None, step)


def npu_apply_fused_ema_adamw():
    from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw as op

    p, step = f32(4), i64(1)
    yield ValueError, "m ", lambda: op(p, p, f32(5), p, p, step)
    yield TypeError, "s ", lambda: op(p, p, p, p, t(4), step)
    yield ValueError, "mode", lambda: op(p, p, p, p, p, step, mode=2)
    yield RuntimeError, "m ", lambda: op(p, p, host(4, dtype=FP32), p, p, step)


def npu_mm_all_reduce_add_rms_norm():
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm import npu_mm_all_reduce_add_rms_norm as op

    yield from mm_all_reduce(op)


def npu_mm_all_reduce_add_rms_norm_():
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm_ import npu_mm_all_reduce_add_rms_norm_ as op

    yield from mm_all_reduce(op)


def mm_all_reduce(op):
    x, weight, residual, gamma = t(4, 64), t(64, 32), t(4, 32), t(32)
    yield ValueError, "x2", lambda: op(x, t(63, 32), residual, gamma, "0")
    yield TypeError, "x1", lambda: op(f32(4, 64), weight, residual, gamma, "0")
    yield ValueError, "reduce_op", lambda: op(x, weight, residual, gamma, "0", "max")
    yield ValueError, "dequant_scale", lambda: op(x, weight, residual, gamma, "0", dequant_scale=t(32))
    yield ValueError, "hcom", lambda: op(x, weight, residual, gamma, "nobody")
    yield RuntimeError, "x2", lambda: op(x, host(64, 32), residual, gamma, "0")


def npu_grouped_mat_mul_all_reduce():
    from mindspeed.ops.npu_grouped_mat_mul_all_reduce import npu_grouped_mat_mul_all_reduce as op

    x, weight = t(6, 16), t(16, 32)
    yield ValueError, "weight", lambda: op([x], [t(8, 32)], "0")
    yield TypeError, "weight", lambda: op([x], [f32(16, 32)], "0")
    yield ValueError, "group_list", lambda: op(x, weight, "0", group_list=[5], split_item=3)
    yield ValueError, "split_item", lambda: op([x], [weight], "0", split_item=4)
    yield ValueError, "hcomm", lambda: op([x], [weight], "nobody")
    yield RuntimeError, "weight", lambda: op([x], [host(16, 32)], "0")


def npu_alltoall_allgather_bmm():
    from mindspeed.ops.npu_all_to_all_all_gather_bmm import npu_alltoall_allgather_bmm as op

    x, weight = t(4, 6, 16), t(4, 16, 8)
    yield ValueError, "weight", lambda: op(x, t(4, 15, 8), "0", 1, "0", 1)
    yield TypeError, "weight", lambda: op(x, f32(4, 16, 8), "0", 1, "0", 1)
    yield ValueError, "act_type", lambda: op(x, weight, "0", 1, "0", 1, act_type="SELU")
    yield ValueError, "shard_type", lambda: op(x, weight, "0", 1, "0", 1, shard_type=2)
    yield ValueError, "group_ep_worldsize", lambda: op(x, t(2, 16, 8), "0", 2, "0", 1)
    yield ValueError, "group_tp", lambda: op(x, weight, "0", 1, "nobody", 1)
    yield RuntimeError, "weight", lambda: op(x, host(4, 16, 8), "0", 1, "0", 1)


def npu_bmm_reducescatter_alltoall():
    from mindspeed.ops.npu_bmm_reduce_scatter_all_to_all import npu_bmm_reducescatter_alltoall as op

    x, weight = t(4, 6, 8), t(4, 8, 16)
    yield ValueError, "weight", lambda: op(x, t(4, 7, 16), "0", 1, "0", 1)
    yield TypeError, "weight", lambda: op(x, f32(4, 8, 16), "0", 1, "0", 1)
    yield ValueError, "shard_type", lambda: op(x, weight, "0", 1, "0", 1, shard_type=2)
    yield ValueError, "group_tp_worldsize", lambda: op(x, weight, "0", 1, "0", 2)
    yield RuntimeError, "bias", lambda: op(x, weight, "0", 1, "0", 1, bias=host(4, 1, 16))


def matmul_all_reduce():
    from mindspeed.ops.lcal_functional import CoCOperations

    op = CoCOperations(torch.distributed.group.WORLD).matmul_all_reduce
    yield ValueError, "input2", lambda: op(t(8, 16), t(15, 7), t(8, 7))
    yield TypeError, "input2", lambda: op(t(8, 16), f32(16, 4), t(8, 4))
    yield RuntimeError, "output", lambda: op(t(8, 16), t(16, 4), host(8, 4))


def all_gather_matmul_v2():
    from mindspeed.ops.lcal_functional import CoCOperations

    op = CoCOperations(torch.distributed.group.WORLD).all_gather_matmul_v2
    yield ValueError, "comm_output", lambda: op(t(8, 16), t(16, 4), t(8, 4), t(8, 15))
    yield TypeError, "comm_output", lambda: op(t(8, 16), t(16, 4), t(8, 4), f32(8, 16))
    yield RuntimeError, "comm_output", lambda: op(t(8, 16), t(16, 4), t(8, 4), host(8, 16))


def matmul_reduce_scatter():
    from mindspeed.ops.lcal_functional import CoCOperations

    op = CoCOperations(torch.distributed.group.WORLD).matmul_reduce_scatter
    yield ValueError, "output", lambda: op(t(8, 16), t(16, 4), t(7, 4))
    yield TypeError, "output", lambda: op(t(8, 16), t(16, 4), f32(8, 4))
    yield RuntimeError, "bias", lambda: op(t(8, 16), t(16, 4), t(8, 4), host(1, 4))


def npu_ffn():
    from mindspeed.ops.ffn import npu_ffn as op

    x, first, second = t(6, 16), t(16, 32), t(32, 16)
    yield ValueError, "weight2", lambda: op(x, first, t(31, 16), "gelu")
    yield TypeError, "weight1", lambda: op(x, f32(16, 32), second, "gelu")
    yield ValueError, "activation", lambda: op(x, first, second, "tanh")
    yield ValueError, "inner_precise", lambda: op(x, first, second, "gelu", inner_precise=2)
    yield RuntimeError, "weight1", lambda: op(x, host(16, 32), second, "gelu")


def npu_quant_gmm():
    from mindspeed.ops.quant_gmm import npu_quant_gmm as op

    x, weight = i8(6, 16), i8(2, 16, 8)
    yield ValueError, "scale", lambda: op(x, weight, f32(2, 7), group_list=[2, 6])
    yield TypeError, "scale", lambda: op(x, weight, t(2, 8), group_list=[2, 6])
    yield TypeError, "x", lambda: op(t(6, 16), weight, f32(2, 8), group_list=[2, 6])
    yield ValueError, "act_type", lambda: op(x, weight, f32(2, 8), group_list=[2, 6], act_type=6)
    yield RuntimeError, "scale", lambda: op(x, weight, host(2, 8, dtype=FP32), group_list=i64(2))


def npu_quant_gmm_v2():
    from mindspeed.ops.quant_gmm import npu_quant_gmm_v2 as op

    yield ValueError, "group_list", lambda: op(i8(6, 16), i8(2, 16, 8), f32(2, 8), group_list=[2, 5])
    yield TypeError, "weight", lambda: op(i8(6, 16), t(2, 16, 8), f32(2, 8), group_list=[2, 4])


def npu_weight_quant_gmm():
    from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm as op

    x, weight = t(6, 16), i8(2, 16, 8)
    yield ValueError, "antiquant_scale", lambda: op(x, weight, t(2, 7), group_list=[2, 6])
    yield TypeError, "antiquant_scale", lambda: op(x, weight, f32(2, 8), group_list=[2, 6])
    yield ValueError, "act_type", lambda: op(x, weight, t(2, 8), group_list=[2, 6], act_type=1)
    yield RuntimeError, "weight", lambda: op(x, i8(2, 16, 8).cpu(), t(2, 8), group_list=i64(2))


def npu_weight_quant_gmm_v2():
    from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm_v2 as op

    yield ValueError, "group_list", lambda: op(t(6, 16), i8(2, 16, 8), t(2, 8), group_list=[2, 5])
    yield TypeError, "weight", lambda: op(t(6, 16), t(2, 16, 8), t(2, 8), group_list=[2, 4])


def scaled_masked_softmax():
    from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax as op

    x = t(2, 3, 32, 64)
    yield ValueError, "mask", lambda: op(x, t(3, 3, dtype=BOOL))
    yield TypeError, "mask", lambda: op(x, t(2, 1, 32, 64))
    yield TypeError, "x", lambda: op(t(2, 3, 32, 64, dtype=INT32), None)
    yield RuntimeError, "mask", lambda: op(x, host(2, 1, 32, 64, dtype=BOOL))


OPERATORS = {  # family: its public operators
    "adamw": (npu_apply_fused_adamw_v2,),
    "alltoall_allgather_bmm": (npu_alltoall_allgather_bmm,),
    "bmm_reducescatter_alltoall": (npu_bmm_reducescatter_alltoall,),
    "coc_ops": (matmul_all_reduce, all_gather_matmul_v2, matmul_reduce_scatter),
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
