"""Older torch_npu: operators and keyword arguments that came later are not used where they are missing, and results stay the same."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import hccl_world, npu_contract, older_torch_npu

BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8
ATTENTION = ("npu_fusion_attention_v2", "npu_fusion_attention_grad_v2")
LATER = {"softmax_layout", "sink", "dropout_mask", "seed", "offset"}


def tensor(*shape, dtype=BF16, grad=False):
    return torch.zeros(*shape, dtype=dtype, device="npu").requires_grad_(grad)


def ran(name):
    from mindspeed.ops import backend_report

    return backend_report("npu")[name]


def ring_update(layout, softmax_layout=""):
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update

    out, stat = ((8, 2, 64), (2, 4, 8, 8)) if layout == "SBH" else ((16, 4, 64), (16, 4, 8))
    block = [tensor(*out), tensor(*stat, dtype=FP32), tensor(*stat, dtype=FP32)]
    lengths = None if layout == "SBH" else torch.tensor([0, 6, 16]).to("npu")
    return npu_ring_attention_update(*block, *block, lengths, layout, softmax_layout=softmax_layout)


@npu_contract()
def test_the_stand_in_refuses_what_the_older_version_lacks(calls):
    import torch_npu

    q = tensor(2, 4, 8, 16)
    with older_torch_npu("npu_swiglu", npu_fusion_attention_v2=("sink",)):
        with pytest.raises(TypeError, match="has no argument sink"):
            torch_npu.npu_fusion_attention_v2(q, q, q, 4, "BNSD", sink=None)
        torch_npu.npu_fusion_attention_v2(q, q, q, 4, "BNSD")
        assert not hasattr(torch.ops.npu, "npu_swiglu") and not hasattr(torch_npu, "npu_swiglu")
        names = [argument.name for argument in torch.ops.npu.npu_fusion_attention_v2.default._schema.arguments]
        assert "sink" not in names and "softmax_layout" in names
    assert hasattr(torch.ops.npu, "npu_swiglu") and hasattr(torch_npu, "npu_swiglu")


@npu_contract()
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_attention_without_later_arguments(calls, layout):
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention

    shape, packed = {
        "BNSD": ((2, 4, 8, 16), {}),
        "TND": ((16, 4, 16), {"actual_seq_qlen": [6, 16], "actual_seq_kvlen": [6, 16]}),
    }[layout]
    inputs = [tensor(*shape, grad=True) for _ in range(3)]
    gradient_arguments = LATER & {"softmax_layout", "sink"}
    with older_torch_npu(npu_fusion_attention_v2=LATER, npu_fusion_attention_grad_v2=gradient_arguments):
        out, top, total, *_ = npu_fusion_attention(*inputs, 4, layout, scale=0.25, **packed)
        out.backward(torch.zeros_like(out))
        assert [ran(name).kernel for name in ("fusion_attention", "fusion_attention_backward")] == ["npu", "npu"]
    names = [name for name in calls.names if "FlashAttention" in name]
    assert [name.rstrip("V23") for name in names] == (
        ["aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad"]
        if layout == "BNSD"
        else ["aclnnFlashAttentionVarLenScore", "aclnnFlashAttentionUnpaddingScoreGrad"]
    )
    assert top.shape == total.shape == ((16, 4, 8) if layout == "TND" else (2, 4, 8, 8))
    assert all(value.grad.shape == value.shape for value in inputs)
    assert ("aclnnIndexSelect" in calls.names or "aclnnIndex" in calls.names or "aclnnGather" in calls.names) == (
        layout == "TND"
    )


@npu_contract()
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_without_its_operator_is_the_plain_form_in_both_directions(calls, name):
    from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention

    inputs = [tensor(2, 4, 8, 16, grad=True) for _ in range(3)]
    with older_torch_npu(name):
        out = npu_fusion_attention(*inputs, 4, "BNSD", keep_prob=0.9)[0]
        out.backward(torch.zeros_like(out))
        reports = [ran(operator) for operator in ("fusion_attention", "fusion_attention_backward")]
    assert [report.kernel for report in reports] == ["ref", "ref"], "masks of the two directions must agree"
    assert all(report.reason == f"this torch_npu has no {name}" for report in reports)
    assert not [kernel for kernel in calls.names if "FlashAttention" in kernel]


@npu_contract()
def test_ring_update_without_its_operator(calls):
    with older_torch_npu("npu_ring_attention_update"):
        for layout in ("SBH", "TND"):
            results = ring_update(layout)
            assert [value.dtype for value in results] == [BF16, FP32, FP32]
            assert ran("ring_attention_update") == ("npu", "ref", "this torch_npu has no npu_ring_attention_update")
    assert "aclnnRingAttentionUpdateV2" not in calls.names


@npu_contract()
def test_ring_update_without_a_layout_of_statistics(calls):
    with older_torch_npu(npu_ring_attention_update=("input_softmax_layout",)):
        ring_update("SBH")
        ring_update("TND")
        assert calls.names.count("aclnnRingAttentionUpdateV2") + calls.names.count("aclnnRingAttentionUpdate") == 2
        ring_update("TND", "TND")
        assert ran("ring_attention_update").reason.endswith("takes statistics in sequence blocks only")


@npu_contract()
def test_rotary_never_asks_for_its_later_argument(calls):
    from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding

    x, table = tensor(8, 2, 4, 16, grad=True), tensor(8, 1, 1, 16)
    with older_torch_npu(npu_rotary_mul=("rotate",)):
        y = npu_rotary_position_embedding(x, table, table)
        y.backward(torch.zeros_like(y))
        assert [ran(name).kernel for name in ("rotary", "rotary_backward")] == ["npu", "npu"]


@npu_contract()
@pytest.mark.parametrize("older", [{"npu_grouped_matmul_add_": ("group_list_type",)}, None])
def test_accumulation(calls, older):
    from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32

    with older_torch_npu("npu_grouped_matmul_add_") if older is None else older_torch_npu(**older):
        npu_groupmatmul_add_fp32(tensor(6, 16), tensor(6, 8), torch.tensor([3, 6]).to("npu"), tensor(2, 16, 8, dtype=FP32))
        assert ran("groupmatmul_add_").kernel == ("ref" if older is None else "npu")
    assert ("aclnnGroupedMatmulAdd" in calls.names) == (older is not None)


@npu_contract()
@pytest.mark.parametrize("kind", ["float", "int8", "weight int8"])
def test_products_with_a_sum_never_lose_a_quantisation_argument(calls, kind):
    from mindspeed.ops.npu_mm_all_reduce_add_rms_norm import npu_mm_all_reduce_add_rms_norm

    x1 = tensor(4, 64, dtype=INT8 if kind == "int8" else BF16)
    x2 = tensor(64, 32, dtype=BF16 if kind == "float" else INT8)
    scale = {"float": {}, "int8": {"dequant_scale": tensor(32)}, "weight int8": {"antiquant_scale": tensor(32)}}[kind]
    older = ("antiquant_scale", "antiquant_offset", "dequant_scale", "antiquant_group_size")
    with hccl_world() as group, older_torch_npu(npu_mm_all_reduce_base=older):
        y, _ = npu_mm_all_reduce_add_rms_norm(x1, x2, tensor(4, 32), tensor(32), group, **scale)
        report = ran("mm_all_reduce_add_rms_norm")
    expected = {"float": ("npu", "accepts the arguments")}
    missing = f"npu_mm_all_reduce_base of this torch_npu has no {next(iter(scale), '')}"
    assert (report.kernel, report.reason) == expected.get(kind, ("ref", missing))
    assert (y.shape, y.dtype) == ((4, 32), BF16)


@npu_contract()
def test_coc_without_a_choice_of_outputs(calls):
    from mindspeed.ops.lcal_functional import CoCOperations

    with hccl_world(2) as group, older_torch_npu(npu_all_gather_base_mm=("gather_output",)):
        CoCOperations(group).all_gather_matmul(tensor(16, 256), tensor(256, 32), tensor(32, 32))
        assert ran("coc_all_gather_matmul_").kernel == "npu"


@npu_contract()
@pytest.mark.parametrize(
    "absent",
    ["npu_moe_token_permute", "npu_moe_token_permute_grad_v2", "npu_moe_token_unpermute", "npu_moe_token_unpermute_grad"],
)
def test_token_permutation_without_one_of_its_operators(calls, absent):
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute

    tokens, probs = tensor(8, 16, grad=True), tensor(8, 2, dtype=FP32, grad=True)
    with older_torch_npu(absent):
        permuted, order = npu_moe_token_permute(tokens, torch.zeros(8, 2, dtype=torch.int64, device="npu"))
        npu_moe_token_unpermute(permuted, order, probs).sum().backward()
    kernels = {
        "npu_moe_token_permute": "aclnnMoeTokenPermute",
        "npu_moe_token_permute_grad_v2": "aclnnMoeTokenPermuteGrad",
        "npu_moe_token_unpermute": "aclnnMoeTokenUnpermute",
        "npu_moe_token_unpermute_grad": "aclnnMoeTokenUnpermuteGrad",
    }
    assert {kernel for kernel in kernels.values() if kernel not in calls.names} == {kernels[absent]}
    assert (tokens.grad.shape, probs.grad.shape) == (tokens.shape, probs.shape)


@npu_contract()
@pytest.mark.parametrize("absent", ["_npu_dropout_gen_mask", "npu_dropout_backward"])
def test_dropout_masks_come_from_one_place(calls, absent):
    from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm

    x, weight = tensor(2, 4, 16, grad=True), tensor(16, grad=True)
    with older_torch_npu(absent):
        y, mask = npu_dropout_add_layer_norm(x, None, weight, None, 0.5, 1e-5, return_dropout_mask=True)
        y.sum().backward()
        names = ("dropout_add_norm", "dropout_add_norm_backward", "dropout_mask")
        assert [ran(name) for name in names] == [("npu", "ref", f"this torch_npu has no {absent}")] * 3
    assert (mask.shape, x.grad.shape) == (x.shape, x.shape)
