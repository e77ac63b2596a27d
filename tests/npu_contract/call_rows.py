"""One call of every operator on the NPU, for the table of expected kernels in `test_call_lists.py`.

A row is a function that makes the inputs and returns the call. Inputs are uninitialised, so that making them launches nothing.
"""

from __future__ import annotations

import torch

BF16, FP16, FP32, INT8, INT32, INT64, BOOL = (
    torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def t(*shape, dtype=BF16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="npu").requires_grad_(grad)


def g(*shape, dtype=BF16):
    """A tensor that wants a gradient."""
    return t(*shape, dtype=dtype, grad=True)


def ints(*values):
    return torch.tensor(values, dtype=INT64).to("npu")


def group():
    return torch.distributed.group.WORLD


# ---- norms, activations, positions ---------------------------------------------------------------------------------------------


def rms_norm():
    from mindspeed.ops.rms_norm import rms_norm

    x, gamma = g(4, 16), g(16)
    return lambda: rms_norm(x, gamma)


def rms_norm_wide_weight():
    from mindspeed.ops.rms_norm import rms_norm

    x, gamma = g(4, 16), g(16, dtype=FP32)
    return lambda: rms_norm(x, gamma)


def layer_norm():
    from mindspeed.ops.layer_norm import layer_norm

    x, weight, bias = g(4, 16), g(16), g(16)
    return lambda: layer_norm(x, weight, bias)


def add_rms_norm():
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm

    x, residual, weight = g(2, 4, 16), g(2, 4, 16), g(16)
    return lambda: npu_dropout_add_rms_norm(x, residual, weight, None, 0.0, 1e-5)


def dropout_add_rms_norm():
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm

    x, residual, weight = g(2, 4, 16), g(2, 4, 16), g(16)
    return lambda: npu_dropout_add_rms_norm(x, residual, weight, None, 0.1, 1e-5)


def dropout_add_layer_norm():
    from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm

    x, residual, weight, bias = g(2, 4, 16), g(2, 4, 16), g(16), g(16)
    return lambda: npu_dropout_add_layer_norm(x, residual, weight, bias, 0.1, 1e-5)


def dropout_mask():
    from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm

    x, weight, bias = t(2, 4, 16), t(16), t(16)
    return lambda: npu_dropout_add_layer_norm(x, None, weight, bias, 0.1, 1e-5, return_dropout_mask=True)


def rotary():
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding

    x, cos, sin = g(8, 2, 4, 16), t(8, 1, 1, 16), t(8, 1, 1, 16)
    return lambda: npu_rotary_position_embedding(x, cos, sin)


def rotary_interleaved():
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding

    x, cos, sin = g(8, 2, 4, 16), t(8, 1, 1, 16), t(8, 1, 1, 16)
    return lambda: npu_rotary_position_embedding(x, cos, sin, 1)


def rotary_tables():
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding

    x, cos, sin = g(8, 2, 4, 16), g(8, 1, 1, 16), g(8, 1, 1, 16)
    return lambda: npu_rotary_position_embedding(x, cos, sin)


def swiglu():
    from mindspeed.ops.swiglu import swiglu

    x = g(4, 16)
    return lambda: swiglu(x)


def bias_swiglu():
    from mindspeed.ops.swiglu import bias_swiglu

    x, bias = g(4, 16), g(16)
    return lambda: bias_swiglu(x, bias)


def weighted_swiglu():
    from mindspeed.ops.swiglu import weighted_swiglu

    x, weights = g(4, 16), g(4, 1, dtype=FP32)
    return lambda: weighted_swiglu(x, weights)


def softmax_causal():
    from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax

    x = g(2, 3, 32, 32)
    return lambda: scaled_masked_softmax(x, None, 0.5, True)


def softmax_masked():
    from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax

    x, mask = g(2, 3, 32, 64), t(2, 1, 32, 64, dtype=BOOL)
    return lambda: scaled_masked_softmax(x, mask, 0.5)


def cross_entropy():
    from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy

    logits, target = g(4, 16), t(4, dtype=INT64)
    return lambda: vocab_parallel_cross_entropy(logits, target)


def cross_entropy_split():
    from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy

    logits, target = g(4, 16), t(4, dtype=INT64)
    return lambda: vocab_parallel_cross_entropy(logits, target, group())


# ---- attention -----------------------------------------------------------------------------------------------------------------


def attention(layout="BNSD", keep_prob=1.0):
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention

    shapes = {"BNSD": ((2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 8)), "TND": ((16, 4, 16), (16, 2, 16), (16, 2, 8))}[layout]
    q, k, v = (g(*shape) for shape in shapes)
    ends = {"actual_seq_qlen": [6, 16], "actual_seq_kvlen": [6, 16]} if layout == "TND" else {}
    return lambda: npu_fusion_attention(q, k, v, 4, layout, keep_prob=keep_prob, **ends)


def attention_dropout():
    return attention(keep_prob=0.9)


def attention_packed():
    return attention("TND")


def ring_update(layout="SBH"):
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update

    out, stat = ((8, 2, 64), (2, 4, 8, 8)) if layout == "SBH" else ((16, 4, 64), (16, 4, 8))
    block = [t(*out), t(*stat, dtype=FP32), t(*stat, dtype=FP32)]
    lengths = None if layout == "SBH" else ints(0, 6, 16)
    return lambda: npu_ring_attention_update(*block, *block, lengths, layout)


def ring_update_packed():
    return ring_update("TND")


# ---- grouped products and accumulation ------------------------------------------------------------------------------------------


def gmm():
    from mindspeed.ops.gmm import npu_gmm

    x, weight, groups = g(8, 16), g(2, 16, 32), ints(3, 8)
    return lambda: npu_gmm(x, weight, group_list=groups)


def gmm_bias():
    from mindspeed.ops.gmm import npu_gmm_v2

    x, weight, bias, groups = g(8, 16), g(2, 16, 32), g(2, 32, dtype=FP32), ints(3, 5)
    return lambda: npu_gmm_v2(x, weight, bias=bias, group_list=groups)


def gmm_list():
    from mindspeed.ops.gmm import npu_gmm

    x, weight = g(8, 16), g(2, 16, 32)
    return lambda: npu_gmm(x, weight, group_list=[3, 8])


def gmm_inner():
    from mindspeed.ops.gmm import npu_gmm

    x, weight, groups = t(8, 16), t(8, 32), ints(3, 8)
    return lambda: npu_gmm(x.t(), weight, group_list=groups, group_type=2)


def gmm_fused_accumulation():
    from mindspeed.ops.gmm import npu_gmm

    x, weight, groups = g(8, 16), g(2, 16, 32), ints(3, 8)
    weight.main_grad, weight.grad_added_to_main_grad = t(2, 16, 32, dtype=FP32), False
    return lambda: npu_gmm(x, weight, group_list=groups, gemm_fusion=True, original_weight=weight)


def matmul_add():
    from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp32

    x, dy, grad = t(8, 16), t(8, 32), t(32, 16, dtype=FP32)
    return lambda: npu_matmul_add_fp32(x, dy, grad)


def groupmatmul_add():
    from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32

    x, dy, groups, grad = t(8, 16), t(8, 32), ints(3, 8), t(2, 16, 32, dtype=FP32)
    return lambda: npu_groupmatmul_add_fp32(x, dy, groups, grad)


def quant_gmm():
    from mindspeed.ops.quant_gmm import npu_quant_gmm

    x, weight, scale, groups = t(6, 16, dtype=INT8), t(2, 16, 8, dtype=INT8), t(2, 8, dtype=FP32), ints(2, 6)
    return lambda: npu_quant_gmm(x, weight, scale, group_list=groups)


def weight_quant_gmm():
    from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm

    x, weight, scale, offset, groups = t(6, 16), t(2, 16, 8, dtype=INT8), t(2, 8), t(2, 8), ints(2, 6)
    return lambda: npu_weight_quant_gmm(x, weight, scale, antiquant_offset=offset, group_list=groups)


def ffn():
    from mindspeed.ops.ffn import npu_ffn

    x, first, second = t(6, 16), t(2, 16, 32), t(2, 32, 16)
    return lambda: npu_ffn(x, first, second, "gelu", expert_tokens=[2, 4])


# ---- tokens to experts -----------------------------------------------------------------------------------------------------------


def permute():
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute

    tokens, indices = g(8, 16), t(8, 2, dtype=INT64)
    return lambda: npu_moe_token_permute(tokens, indices)


def permute_dropping():
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute

    tokens, indices = g(8, 16), t(8, 2, dtype=INT64)
    return lambda: npu_moe_token_permute(tokens, indices, num_out_tokens=12)


def unpermute():
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute

    rows, order, probs = g(16, 16), t(16, dtype=INT32), g(8, 2, dtype=FP32)
    return lambda: npu_moe_token_unpermute(rows, order, probs)


def unpermute_top_1():
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute

    rows, order = g(8, 16), t(8, dtype=INT32)
    return lambda: npu_moe_token_unpermute(rows, order)


def permute_map():
    from mindspeed.ops.moe_routing_map import permute

    tokens, routing_map, probs = g(8, 16), t(8, 4, dtype=BOOL), g(8, 4, dtype=FP32)
    return lambda: permute(tokens, routing_map, probs, num_out_tokens=16)


def unpermute_map():
    from mindspeed.ops.moe_routing_map import DESTINATION, RowMap, unpermute

    rows, row_map, probs = g(16, 16), RowMap(DESTINATION, t(8, 4, dtype=INT32)), g(8, 4, dtype=FP32)
    return lambda: unpermute(rows, row_map, (8, 16), probs)


def sort_chunks():
    from mindspeed.ops.sort_chunks import sort_chunks

    x, sizes, order = g(8, 16), ints(3, 5), ints(1, 0)
    return lambda: sort_chunks(x, sizes, order)


# ---- optimizers ------------------------------------------------------------------------------------------------------------------


def adamw():
    from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2

    p, m, v, grad, step = t(8), t(8), t(8), t(8, dtype=FP32), ints(1)
    return lambda: npu_apply_fused_adamw_v2(p, grad, m, v, None, step)


def adamw_amsgrad():
    from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2

    p, m, v, top, grad = (t(8, dtype=FP32) for _ in range(5))
    step = ints(1)
    return lambda: npu_apply_fused_adamw_v2(p, grad, m, v, top, step, amsgrad=True)


def ema_adamw(mode=1):
    from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw

    tensors, step = [t(8, dtype=FP32) for _ in range(5)], ints(1)
    return lambda: npu_apply_fused_ema_adamw(*tensors, step, mode=mode)


def ema_adam():
    return ema_adamw(mode=0)


# ---- products with collectives, in a world of two ------------------------------------------------------------------------------------


def mm_all_reduce_add_rms_norm():
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm import npu_mm_all_reduce_add_rms_norm

    x1, x2, residual, gamma, bias = t(4, 64), t(64, 32), t(4, 32), t(32), t(32)
    return lambda: npu_mm_all_reduce_add_rms_norm(x1, x2, residual, gamma, group(), bias=bias)


def mm_all_reduce_add_rms_norm_in_place():
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm_ import npu_mm_all_reduce_add_rms_norm_

    x1, x2, residual, gamma = t(4, 64), t(64, 32), t(4, 32), t(32)
    return lambda: npu_mm_all_reduce_add_rms_norm_(x1, x2, residual, gamma, group())


def grouped_mat_mul_all_reduce():
    from mindspeed.ops.npu_grouped_mat_mul_all_reduce import npu_grouped_mat_mul_all_reduce

    x, weight = [t(4, 16), t(6, 16)], [t(16, 8), t(16, 8)]
    return lambda: npu_grouped_mat_mul_all_reduce(x, weight, group())


def alltoall_allgather_bmm():
    from mindspeed.ops.npu_all_to_all_all_gather_bmm import npu_alltoall_allgather_bmm

    x, weight, bias = t(4, 6, 16), t(2, 16, 8), t(2, 8)
    return lambda: npu_alltoall_allgather_bmm(x, weight, group(), 2, group(), 2, bias=bias, shard_type=1, act_type="gelu")


def bmm_reducescatter_alltoall():
    from mindspeed.ops.npu_bmm_reduce_scatter_all_to_all import npu_bmm_reducescatter_alltoall

    x, weight, bias = t(2, 24, 8), t(2, 8, 16), t(2, 1, 16)
    return lambda: npu_bmm_reducescatter_alltoall(x, weight, group(), 2, group(), 2, bias=bias, shard_type=1)


def coc_matmul_all_reduce():
    from mindspeed.ops.lcal_functional import CoCOperations

    x, weight, output = t(16, 256), t(256, 32), t(16, 32)
    return lambda: CoCOperations(group()).matmul_all_reduce(x, weight, output)


def coc_all_gather_matmul():
    from mindspeed.ops.lcal_functional import CoCOperations

    x, weight, output, gathered = t(16, 256), t(256, 32), t(32, 32), t(32, 256)
    return lambda: CoCOperations(group()).all_gather_matmul_v2(x, weight, output, gathered)


def coc_matmul_reduce_scatter():
    from mindspeed.ops.lcal_functional import CoCOperations

    x, weight, output = t(16, 256), t(256, 32), t(8, 32)
    return lambda: CoCOperations(group()).matmul_reduce_scatter(x, weight, output)
