"""Bad calls of operators on one device: error, argument at fault, call."""

from __future__ import annotations

from tests.npu_contract.samples import BOOL, FP16, FP32, INT32, INT64, f32, host, i64, t


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


def vocab_parallel_cross_entropy():
    from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy as op

    yield ValueError, "target", lambda: op(t(4, 2, 16), i64(4))
    yield ValueError, "logits", lambda: op(t(4, 0), i64(4))
    yield TypeError, "logits", lambda: op(t(4, 16, dtype=INT32), i64(4))
    yield TypeError, "target", lambda: op(t(4, 16), t(4, dtype=INT32))
    yield ValueError, "group", lambda: op(t(4, 16), i64(4), "nobody")
    yield RuntimeError, "target", lambda: op(t(4, 16), host(4, dtype=INT64))


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
