"""Inference operators on the NPU: products with a collective, feed-forward network, quantised grouped products."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import hccl_world, npu_contract

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
HELPERS = (
    "aclnnInplaceOne",
    "aclnnInplaceZero",
    "aclnnInplaceCopy",
    "aclnnArange",
    "aclnnGeTensor",
    "aclnnInplaceMaskedFillScalar",
)


def tensor(*shape, dtype=BF16):
    return torch.zeros(*shape, dtype=dtype, device="npu")


def launched(calls):
    return [name for name in calls.names if name not in HELPERS]


@npu_contract()
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["float", "int8", "weight int8"])
def test_mm_all_reduce_add_rms_norm(calls, kind, in_place):
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm import npu_mm_all_reduce_add_rms_norm
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm_ import npu_mm_all_reduce_add_rms_norm_

    x1 = tensor(2, 4, 64, dtype=INT8 if kind == "int8" else BF16)
    x2 = tensor(64, 32, dtype=BF16 if kind == "float" else INT8)
    options = {
        "float": {"bias": tensor(32)},
        "int8": {"dequant_scale": tensor(32, dtype=BF16), "bias": tensor(32, dtype=torch.int32)},
        "weight int8": {"antiquant_scale": tensor(32)},
    }[kind]
    residual, gamma = tensor(2, 4, 32), tensor(32)
    with hccl_world() as group:
        calls.reset()
        operator = npu_mm_all_reduce_add_rms_norm_ if in_place else npu_mm_all_reduce_add_rms_norm
        y, norm_out = operator(x1, x2, residual, gamma, group, **options)
        product, norm = launched(calls)
    assert "MatmulAllReduce" in product and norm == "aclnnAddRmsNorm"
    assert y.shape == norm_out.shape == residual.shape and y.dtype == norm_out.dtype == BF16
    assert (y.data_ptr() == residual.data_ptr()) == in_place


@npu_contract()
def test_grouped_mat_mul_all_reduce_is_one_collective(calls):
    from mindspeed.ops.npu_grouped_mat_mul_all_reduce import npu_grouped_mat_mul_all_reduce

    x, weight, bias = [tensor(2, 4, 16), tensor(5, 16)], [tensor(16, 8), tensor(16, 8)], [tensor(8, dtype=FP32)] * 2
    with hccl_world() as group:
        calls.reset()
        results = npu_grouped_mat_mul_all_reduce(x, weight, group, bias=bias)
        torch.npu.synchronize()
        assert [calls.names.count(name) for name in ("aclnnGroupedMatmulV5", "HcclAllReduce")] == [1, 1]
    assert [tuple(value.shape) for value in results] == [(2, 4, 8), (5, 8)]


@npu_contract()
def test_ffn(calls):
    from mindspeed.ops.ffn import npu_ffn

    x = tensor(6, 16)
    gated = [tensor(*shape, dtype=FP16) for shape in ((6, 16), (16, 64), (32, 16))]
    y = npu_ffn(*gated, "swiglu", inner_precise=1)
    assert launched(calls) == ["aclnnFFNV2"] and (y.shape, y.dtype) == (x.shape, FP16)
    calls.reset()
    y = npu_ffn(x, tensor(2, 16, 32), tensor(2, 32, 16), "gelu", expert_tokens_index=[2, 6], bias1=tensor(2, 32, dtype=FP32))
    assert launched(calls) == ["aclnnFFNV2"]
    assert (2, 4) in calls.named("aclnnFFNV2")[0].int_lists, "the sizes of the experts"


@npu_contract()
@pytest.mark.parametrize(("dtype", "precise"), [(BF16, 0), (BF16, 1), (FP16, 0), (FP16, None)])
def test_ffn_with_a_gate_is_a_kernel_for_fast_float16_only(calls, dtype, precise):
    from mindspeed.ops import backend_report
    from mindspeed.ops.ffn import npu_ffn

    weights = tensor(16, 64, dtype=dtype), tensor(32, 16, dtype=dtype)
    y = npu_ffn(tensor(6, 16, dtype=dtype), *weights, "geglu", inner_precise=precise)
    ran = backend_report("npu")["ffn"]
    assert (y.shape, y.dtype, ran.kernel) == ((6, 16), dtype, "ref")
    assert ran.reason == "npu_ffn has geglu for float16 with inner_precise=1 only"


@npu_contract()
def test_ffn_of_int8(calls):
    from mindspeed.ops.ffn import npu_ffn

    y = npu_ffn(
        tensor(6, 16, dtype=INT8), tensor(16, 32, dtype=INT8), tensor(32, 16, dtype=INT8), "relu", scale=tensor(1, dtype=FP32),
        deq_scale1=tensor(32, dtype=torch.int64), deq_scale2=tensor(16, dtype=torch.int64),
    )  # fmt: skip
    assert launched(calls)[-1] == "aclnnFFNV2" and (y.shape, y.dtype) == ((6, 16), FP16)


@npu_contract()
@pytest.mark.parametrize("output", [FP16, BF16, INT8])
def test_quant_gmm(calls, output):
    from mindspeed.ops.quant_gmm import npu_quant_gmm

    scale = tensor(2, 1, dtype={FP16: FP32, BF16: BF16, INT8: torch.int64}[output])
    per_token = None if output == INT8 else tensor(6, dtype=FP32)
    y = npu_quant_gmm(
        tensor(6, 16, dtype=INT8),
        tensor(2, 16, 8, dtype=INT8),
        scale,
        per_token_scale=per_token,
        group_list=[2, 6],
        output_dtype=output,
    )
    (call,) = (call for call in calls if call.name.startswith("aclnnGroupedMatmul"))
    assert (2, 8) in {argument.shape for argument in call.tensors if argument.dtype == str(scale.dtype).removeprefix("torch.")}
    assert (y.shape, y.dtype) == ((6, 8), output)


@npu_contract()
def test_weight_quant_gmm(calls):
    from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm_v2

    y = npu_weight_quant_gmm_v2(tensor(6, 16), tensor(2, 16, 8, dtype=INT8), tensor(2, 8), group_list=[2, 4])
    assert [name for name in launched(calls) if "GroupedMatmul" in name] == ["aclnnGroupedMatmulV5"]
    assert (y.shape, y.dtype) == ((6, 8), BF16)
