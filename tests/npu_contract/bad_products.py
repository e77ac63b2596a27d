"""Bad calls of products with collectives, of quantised products and of the masked softmax: error, argument at fault, call."""

from __future__ import annotations

import torch

from tests.npu_contract.samples import BOOL, FP32, INT32, f32, host, i8, i64, t


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
