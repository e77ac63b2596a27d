"""torch_npu's own shape functions agree with ours on meta tensors; the defects that we work around are still there."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import npu_contract

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def described(values):
    values = (values,) if isinstance(values, torch.Tensor) else values
    return [(tuple(value.shape), value.dtype) for value in values]


def pairs():
    """(our operator, its arguments, torch_npu's operator, its arguments, which of torch_npu's outputs correspond)."""
    from mindspeed.ops import gmm, npu_ring_attention_update, npu_rotary_position_embedding, rms_norm, swiglu  # noqa: F401

    ours, theirs = torch.ops.mindspeed, torch.ops.npu
    x, gamma, rstd = meta(4, 3, 16), meta(16), meta(4, 3, 1, dtype=FP32)
    head, table = meta(8, 2, 4, 16), meta(8, 1, 1, 16)
    rows, weight, groups = meta(6, 16), meta(2, 16, 8), meta(2, dtype=torch.int64)
    block = (meta(8, 2, 64), meta(2, 4, 8, 8, dtype=FP32), meta(2, 4, 8, 8, dtype=FP32))
    yield ours.rms_norm, (x, gamma, 1e-6), theirs.npu_rms_norm, (x, gamma), slice(2)
    yield ours.rms_norm_backward, (x, x, gamma, rstd), theirs.npu_rms_norm_backward, (x, x, gamma, rstd), slice(1)
    yield ours.swiglu, (x, 2), theirs.npu_swiglu, (x,), slice(1)
    yield ours.swiglu_backward, (meta(4, 3, 8), x, 2), theirs.npu_swiglu_backward, (meta(4, 3, 8), x), slice(1)
    yield ours.rotary, (head, table, table, 0), theirs.npu_rotary_mul, (head, table, table), slice(1)
    options = {"group_list": groups, "split_item": 3, "group_type": 0}
    yield (
        ours.gmm,
        (rows, weight, None, groups, 0, 0),
        lambda a, b: theirs.npu_grouped_matmul([a], [b], **options)[0],
        (
            rows,
            weight,
        ),
        slice(1),
    )
    yield (
        ours.ring_attention_update,
        (*block, *block, None, "SBH", ""),
        theirs.npu_ring_attention_update,
        (*block, *block),
        slice(3),
    )


@npu_contract()
def test_shape_functions_agree(calls):
    for operator, arguments, theirs, their_arguments, outputs in pairs():
        expected = described(theirs(*their_arguments))[outputs]
        assert described(operator(*arguments))[outputs] == expected, str(operator)
    assert calls.names == [], "shape functions launch nothing"


@npu_contract()
def test_known_defects(calls):
    """What keeps our bodies from using host lists and from tracing attention through torch_npu's own functions."""
    import torch_npu

    x, weight = torch.zeros(6, 16, dtype=BF16, device="npu"), torch.zeros(2, 16, 8, dtype=BF16, device="npu")
    (listed,) = torch_npu.npu_grouped_matmul([x], [weight], group_list=[3, 6], split_item=3, group_type=0)
    assert tuple(listed.shape) == (6, 16), "right would be (6, 8)"
    q = meta(2, 4, 8, 16)
    with pytest.raises(TypeError):
        torch_npu.npu_fusion_attention_grad_v2(q, q, q, q, 4, "BNSD", scale_value=0.25)
