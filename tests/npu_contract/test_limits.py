"""What the kernels' documentation excludes runs as plain torch, with a reason, one warning and no launch of the kernel.

torch_npu would accept most of it, and the device would fail or, worse, would not.
"""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch

from mindspeed.testing.npu_contract import hccl_world, npu_contract

BF16, FP16, FP32, FP64, INT8, INT32, INT64 = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64,
)  # fmt: skip


def t(*shape, dtype=BF16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="npu").requires_grad_(grad)


def ran(name):
    from mindspeed.ops import backend_report

    return backend_report("npu")[name]


def rotate(x, table, mode=0, tables=False):
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding

    x, cos, sin = t(*x, grad=True), t(*table, grad=tables), t(*table, grad=tables)
    y = npu_rotary_position_embedding(x, cos, sin, mode)
    y.backward(torch.empty_like(y))
    return [ran(name) for name in ("rotary", "rotary_backward")]


@npu_contract()
@pytest.mark.parametrize(
    ("x", "table", "mode", "kernel"),
    [
        ((2, 4, 8, 16), (1, 1, 8, 16), 0, "npu"),  # BNSD
        ((2, 4, 8, 16), (2, 1, 8, 16), 0, "npu"),
        ((2, 4, 8, 16), (2, 4, 8, 16), 0, "npu"),
        ((2, 8, 4, 16), (1, 8, 1, 16), 0, "npu"),  # BSND
        ((2, 8, 4, 16), (2, 8, 1, 16), 0, "npu"),
        ((8, 2, 4, 16), (8, 1, 1, 16), 0, "npu"),  # SBND
        ((8, 2, 4, 16), (8, 2, 1, 16), 0, "npu"),
        ((8, 2, 4, 16), (1, 2, 4, 16), 0, "ref"),  # no positions
        ((2, 4, 8, 16), (1, 1, 8, 16), 1, "npu"),
        ((2, 8, 4, 16), (1, 8, 1, 16), 1, "npu"),
        ((8, 2, 4, 16), (8, 1, 1, 16), 1, "npu"),
        ((8, 2, 4, 16), (8, 2, 1, 16), 1, "ref"),  # interleaved pairs want tables without batch
        ((2, 4, 8, 894), (1, 1, 8, 894), 0, "npu"),
        ((2, 4, 8, 896), (1, 1, 8, 896), 0, "ref"),
        ((999, 4, 2, 16), (1, 1, 2, 16), 0, "npu"),
        ((1000, 4, 2, 16), (1, 1, 2, 16), 0, "ref"),
        ((2, 1000, 4, 16), (2, 1000, 1, 16), 0, "npu"),  # 1000 positions
        ((2, 4, 1000, 16), (2, 4, 1000, 16), 0, "npu"),
        ((25, 40, 2, 16), (1, 1, 2, 16), 0, "npu"),
        ((25, 40, 2, 16), (1, 1, 2, 16), 1, "ref"),  # batch x heads = 1000
        ((25, 39, 2, 16), (1, 1, 2, 16), 1, "npu"),
    ],
)
def test_rotary(calls, x, table, mode, kernel):
    assert [report.kernel for report in rotate(x, table, mode)] == [kernel, kernel]
    assert calls.names.count("aclnnRotaryPositionEmbeddingV2") == (2 if kernel == "npu" else 0)


@npu_contract()
@pytest.mark.parametrize(("batch", "kernel"), [(64, "npu"), (65, "ref")])
def test_rotary_with_gradients_of_the_tables(calls, batch, kernel):
    assert [report.kernel for report in rotate((2, batch, 16, 8), (2, 1, 1, 8), tables=True)] == ["npu", kernel]
    assert calls.names.count("aclnnRotaryPositionEmbeddingGrad") == (kernel == "npu")


@npu_contract()
def test_one_warning_per_reason(calls):
    from mindspeed.ops import _registry

    operator = _registry.REGISTRY.operators.get("rotary")
    if operator is not None:
        operator.told.clear()
    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    _registry.logger.addHandler(handler)
    try:
        for _ in range(3):
            rotate((2, 4, 8, 898), (1, 1, 8, 898))
    finally:
        _registry.logger.removeHandler(handler)
    assert [text for text in heard if "mindspeed::rotary " in text] == [
        "mindspeed::rotary on npu: the npu kernel steps aside: x of shape (2, 4, 8, 898) is beyond the limits of npu_rotary_mul"
    ]


@npu_contract()
@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "kernel"),
    [
        (32, 32, BF16, "npu"), (4096, 32, FP16, "npu"), (32, 4096, FP32, "npu"), (16, 48, BF16, "ref"), (48, 32, BF16, "ref"),
        (32, 4128, BF16, "ref"), (32, 32, FP64, "ref"),
    ],
)  # fmt: skip
def test_softmax(calls, queries, keys, dtype, kernel):
    from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax

    x = t(1, 1, queries, keys, dtype=dtype, grad=True)
    y = scaled_masked_softmax(x, None, 0.5, True)
    y.backward(torch.empty_like(y))
    names = ("scaled_masked_softmax", "scaled_masked_softmax_backward")
    assert [ran(name).kernel for name in names] == [kernel, kernel]
    assert [calls.names.count(name) for name in ("ScaledMaskedSoftmax", "ScaledMaskedSoftmaxGrad")] == [
        int(kernel == "npu")
    ] * 2


@npu_contract()
def test_softmax_without_a_mask_has_no_kernel(calls):
    from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax

    scaled_masked_softmax(t(2, 3, 32, 32), None, 0.5)
    assert ran("scaled_masked_softmax") == ("npu", "ref", "nothing is masked")


@npu_contract()
@pytest.mark.parametrize(
    ("inner", "groups", "kernel"), [(65535, 2, "npu"), (65536, 2, "ref"), (16, 1024, "npu"), (16, 1025, "ref")]
)
def test_grouped_products(calls, inner, groups, kernel):
    from mindspeed.ops.gmm import npu_gmm

    ends = torch.full((groups,), 4, dtype=INT64).to("npu")
    npu_gmm(t(4, inner), t(groups, inner, 8), group_list=ends)
    assert ran("gmm").kernel == kernel and ("aclnnGroupedMatmulV5" in calls.names) == (kernel == "npu")


@npu_contract()
@pytest.mark.parametrize(
    ("inner", "groups", "kernel"), [(65535, 2, "npu"), (65536, 2, "ref"), (16, 1024, "npu"), (16, 1025, "ref")]
)
def test_grouped_accumulation(calls, inner, groups, kernel):
    from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32

    ends = torch.full((groups,), 4, dtype=INT64).to("npu")
    npu_groupmatmul_add_fp32(t(4, inner), t(4, 1), ends, t(groups, inner, 1, dtype=FP32))
    assert ran("groupmatmul_add_").kernel == kernel and ("aclnnGroupedMatmulAdd" in calls.names) == (kernel == "npu")


@npu_contract()
def test_a_single_size_is_given_as_an_end(calls):
    """The kernel refuses one size."""
    import torch_npu

    from mindspeed.ops.gmm import npu_gmm_v2

    original, seen = torch_npu.npu_grouped_matmul, []

    def watched(*operands, **options):
        seen.append((options["group_list"].numel(), options["group_list_type"]))
        return original(*operands, **options)

    with mock.patch.object(torch_npu, "npu_grouped_matmul", watched):
        npu_gmm_v2(t(8, 16), t(1, 16, 8), group_list=torch.tensor([8]).to("npu"))
        npu_gmm_v2(t(8, 16), t(2, 16, 8), group_list=torch.tensor([3, 5]).to("npu"))
    assert seen == [(1, 0), (2, 1)]


@npu_contract()
def test_token_permutation(calls):
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute

    def both(tokens, copies):
        rows, order = npu_moe_token_permute(t(tokens, 8), t(tokens, copies, dtype=INT64))
        npu_moe_token_unpermute(rows, order, t(tokens, copies, dtype=FP32))
        return [ran(name) for name in ("moe_token_permute", "moe_token_unpermute")]

    assert [report.kernel for report in both(2, 512)] == ["npu", "npu"]
    assert calls.names.count("aclnnMoeTokenUnpermute") == 1
    both(2, 513)  # another body, which sums by itself
    assert calls.names.count("aclnnMoeTokenUnpermute") == 1
    from mindspeed.ops.kernels.npu import moe_token_permute

    with mock.patch.object(moe_token_permute, "MOST_ENTRIES", 1024):
        calls.reset()
        assert both(2, 512)[0] == ("npu", "ref", "npu_moe_token_permute takes fewer than 1024 entries, not 1024")
        assert not {"aclnnMoeTokenPermute", "aclnnMoeTokenUnpermute"} & set(calls.names)


@npu_contract()
def test_products_with_a_sum(calls):
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm import npu_mm_all_reduce_add_rms_norm

    def reason(ranks, x1, x2, dtype=BF16, **scales):
        with hccl_world(ranks) as group:
            npu_mm_all_reduce_add_rms_norm(x1, x2, t(4, 8, dtype=dtype), t(8, dtype=dtype), group, **scales)
            return ran("mm_all_reduce_add_rms_norm").reason

    assert reason(8, t(4, 64), t(64, 8)) == "accepts the arguments"
    assert reason(3, t(4, 64), t(64, 8)) == "npu_mm_all_reduce_base takes groups of 1, 2, 4, 8 ranks, not 3"
    assert "16-bit and int8" in reason(1, t(4, 64, dtype=FP32), t(64, 8, dtype=FP32), FP32)
    assert "below 65536, not 65536" in reason(1, t(4, 65536), t(65536, 8, dtype=INT8), antiquant_scale=t(8))
    assert calls.names.count("aclnnMatmulAllReduce") == 1


@npu_contract()
@pytest.mark.parametrize(
    ("output", "scale", "dequant", "kernel"),
    [
        (FP16, (1,), (INT64, INT64), "npu"), (FP16, (1,), (FP32, FP32), "npu"), (FP16, (32,), (INT64, INT64), "npu"),
        (BF16, (1,), (BF16, BF16), "npu"), (FP16, (32,), (FP32, FP32), "ref"), (FP16, (1,), (BF16, BF16), "ref"),
        (BF16, (1,), (FP32, FP32), "ref"), (FP16, (1,), (INT64, FP32), "ref"),
    ],
)  # fmt: skip
def test_ffn_of_int8(calls, output, scale, dequant, kernel):
    from mindspeed.ops.ffn import npu_ffn

    operands = t(6, 16, dtype=INT8), t(16, 32, dtype=INT8), t(32, 16, dtype=INT8)
    scales = {"deq_scale1": t(32, dtype=dequant[0]), "deq_scale2": t(16, dtype=dequant[1]), "scale": t(*scale, dtype=FP32)}
    npu_ffn(*operands, "relu", output_dtype=output, **scales)
    assert ran("ffn").kernel == kernel and ("aclnnFFNV2" in calls.names or "aclnnFFNV3" in calls.names) == (kernel == "npu")


@npu_contract()
def test_dimensions_and_float64(calls):
    from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy as cross_entropy
    from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update
    from mindspeed.ops.rms_norm import rms_norm
    from mindspeed.ops.swiglu import bias_swiglu, swiglu, weighted_swiglu

    def reason(operator, call):
        call()
        assert ran(operator).kernel == "ref"
        return ran(operator).reason

    wide = {"dtype": FP64}
    assert reason("rms_norm", lambda: rms_norm(t(16), t(16))) == "npu_rms_norm takes 2 to 8 dimensions, not 1"
    assert reason("rms_norm", lambda: rms_norm(t(4, 16, **wide), t(16, **wide))) == "npu_rms_norm has no float64"
    assert reason("swiglu", lambda: swiglu(t(*[1] * 8, 16))) == "npu_swiglu takes 1 to 8 dimensions, not 9"
    assert "no float64" in reason("swiglu", lambda: swiglu(t(4, 16, **wide)))
    assert "no float64" in reason("bias_swiglu", lambda: bias_swiglu(t(4, 16, **wide), t(16, **wide)))
    assert "no float64" in reason("swiglu_weighted", lambda: weighted_swiglu(t(4, 16, **wide), t(4, 1, **wide)))
    assert "no float64" in reason("vocab_parallel_cross_entropy", lambda: cross_entropy(t(4, 16, **wide), t(4, dtype=INT64)))
    norm = t(4, 16, **wide), None, t(16, **wide), None, 0.0, 1e-5
    assert "no float64" in reason("dropout_add_norm", lambda: npu_dropout_add_rms_norm(*norm))
    block = t(8, 2, 64, **wide), t(2, 4, 8, 8, dtype=FP32), t(2, 4, 8, 8, dtype=FP32)
    assert "no float64" in reason("ring_attention_update", lambda: npu_ring_attention_update(*block, *block))
    assert not {"aclnnRmsNorm", "aclnnSwiGlu", "aclnnAddRmsNorm", "aclnnRingAttentionUpdateV2"} & set(calls.names)
