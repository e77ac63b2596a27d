"""NPU bodies give the numbers of the definitions when torch_npu's operators do what their documentation says."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_semantics import body, npu_semantics

BF16, FP32 = torch.bfloat16, torch.float32


def assert_same(name, *arguments, index=0, empty=()):
    """Compare a body with the definition; `empty`: outputs whose content is not asked for."""
    from mindspeed.ops._registry import REGISTRY

    ours, expected = body(name, index)(*arguments), REGISTRY.operators[name].reference(*arguments)
    ours, expected = ((value,) if isinstance(value, torch.Tensor) else tuple(value) for value in (ours, expected))
    for number, (value, truth) in enumerate(zip(ours, expected, strict=True)):
        assert (value.shape, value.dtype) == (truth.shape, truth.dtype), f"{name}, output {number}"
        if number not in empty:
            tolerance = 1.6e-2 if value.dtype == BF16 else 1e-5
            torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")
    return ours


def normal(*shape, dtype=FP32):
    return torch.randn(*shape).to(dtype)


@npu_semantics()
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
def test_rms_norm_and_swiglu(dtype, weight_dtype):
    import mindspeed.ops.rms_norm
    import mindspeed.ops.swiglu  # noqa: F401

    x, dy, weight = normal(3, 5, 16, dtype=dtype), normal(3, 5, 16, dtype=dtype), normal(16, dtype=weight_dtype)
    _, rstd = assert_same("rms_norm", x, weight, 1e-6)
    assert_same("rms_norm_backward", dy, x, weight, rstd)
    half, scale = normal(3, 5, 8, dtype=dtype), normal(3, 5, 1)
    for name, first, last in (("swiglu", (), (2,)), ("bias_swiglu", (), (weight,)), ("swiglu_weighted", (), (scale,))):
        assert_same(name, *first, x, *last)
        assert_same(f"{name}_backward", half, x, *last)


@npu_semantics()
@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("mode", [0, 1])
def test_rotary(mode, rotated):
    import mindspeed.ops.npu_rotary_position_embedding  # noqa: F401

    x, dy, cos, sin = normal(7, 2, 3, 16), normal(7, 2, 3, 16), normal(7, 1, 1, rotated), normal(7, 1, 1, rotated)
    assert_same("rotary", x, cos, sin, mode)
    assert_same("rotary_backward", dy, None, cos, sin, mode)
    assert_same("rotary_backward", dy, x, cos, sin, mode)


@npu_semantics()
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_clears_rows_without_an_entry(causal):
    import mindspeed.ops.scaled_masked_softmax  # noqa: F401

    x, dy = normal(2, 3, 32, 32), normal(2, 3, 32, 32)
    mask = torch.rand(2, 1, 32, 32) < 0.3
    mask[:, :, 4] = True
    (y,) = assert_same("scaled_masked_softmax", x, mask, 0.5, causal)
    assert y[:, :, 4].eq(0).all()
    assert_same("scaled_masked_softmax_backward", dy, y, 0.5)
    assert_same("scaled_masked_softmax", x[0], None, 0.5, True)


@npu_semantics()
@pytest.mark.parametrize("block_bytes", [256 << 20, 2 * 7 * 4])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_cross_entropy_of_a_shard_in_blocks_of_rows(dtype, block_bytes):
    from unittest import mock

    import mindspeed.ops.cross_entropy
    from mindspeed.ops._registry import REGISTRY

    REGISTRY.load("cross_entropy", "npu")
    from mindspeed.ops.kernels.npu import cross_entropy

    logits, target = normal(5, 3, 7, dtype=dtype), torch.randint(0, 14, (5, 3))
    logits[0, 0, :4], target[1, 1] = -torch.inf, mindspeed.ops.cross_entropy.IGNORED
    before = logits.clone()
    with mock.patch.object(cross_entropy, "BLOCK_BYTES", block_bytes):
        _, statistics = assert_same("vocab_parallel_cross_entropy", logits, target, 7, "")
        statistics[:, 0, 0] = 1.0  # as if another shard had the maximum
        assert_same("vocab_parallel_cross_entropy_backward", normal(5, 3), logits, target, statistics, 7)
    assert torch.equal(logits, before)
    logits[0, 0] = -torch.inf  # a shard of nothing but padding adds 0 to the sum, not NaN
    assert body("vocab_parallel_cross_entropy")(logits, target, 7, "")[1][:, 0, 0].tolist() == [-torch.inf, 0.0]


@npu_semantics()
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rms", [False, True])
def test_dropout_add_norm(rms, p):
    from unittest import mock

    from mindspeed.ops import _dropout_add_norm

    rng = torch.tensor([5, 8]) if p == 0.3 else None
    x, residual, weight, bias = normal(3, 5, 16, dtype=BF16), normal(3, 5, 16), normal(16), normal(16)
    row, layer, dy, dpre = normal(3, 5, dtype=BF16), normal(16), normal(3, 5, 16, dtype=BF16), normal(3, 5, 16)
    keep = body("dropout_mask")(x, rng, p)
    with mock.patch.object(_dropout_add_norm, "keep_mask", lambda *_: keep):  # the definition under the same mask
        outputs = assert_same("dropout_add_norm", x, residual, weight, bias, row, layer, rng, p, 1e-5, rms, FP32)
        _, pre, mean, rstd = outputs
        assert_same(
            "dropout_add_norm_backward", dy, dpre, x, pre, weight, row, layer, mean, rstd, rng, p, residual.dtype, bias.dtype
        )
    assert_same("dropout_add_norm", x.float(), residual, weight, None, None, None, None, 0.0, 1e-5, True, FP32)


@npu_semantics()
@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(transposed, sizes):
    import mindspeed.ops.gmm
    import mindspeed.ops.npu_groupmatmul_add
    import mindspeed.ops.npu_matmul_add  # noqa: F401

    groups = torch.tensor([3, 0, 6] if sizes else [3, 3, 9])
    x, dy, bias = normal(12, 16), normal(12, 8), normal(3, 8)
    weight = normal(3, 8, 16).transpose(1, 2) if transposed else normal(3, 16, 8)
    assert_same("gmm", x, weight, bias, groups, 0, int(sizes))
    assert_same("gmm", x.t(), dy, None, groups, 2, int(sizes))
    assert_same("gmm_backward", dy, x, weight, groups, int(sizes), True, True, True)


@npu_semantics()
def test_accumulation_adds_in_float32():
    from unittest import mock

    import mindspeed.ops.npu_groupmatmul_add
    import mindspeed.ops.npu_matmul_add  # noqa: F401

    x, dy = normal(12, 16, dtype=BF16), normal(12, 8, dtype=BF16)
    grad = normal(3, 16, 8)
    expected = grad + torch.stack([x[i:j].float().t() @ dy[i:j].float() for i, j in ((0, 3), (3, 3), (3, 12))])
    body("groupmatmul_add_")(x, dy, torch.tensor([3, 3, 12]), grad)
    torch.testing.assert_close(grad, expected)

    total, expected = normal(8, 16), None
    expected = total + dy.float().t() @ x.float()
    matmul_add = body("matmul_add_")
    with mock.patch.dict(matmul_add.__globals__, atb_product=lambda: None):
        matmul_add(x, dy, total)
    torch.testing.assert_close(total, expected)


@npu_semantics()
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("mode", [0, 1])
def test_ema_adamw(mode, decay):
    import mindspeed.ops.npu_apply_fused_ema_adamw  # noqa: F401
    from mindspeed.ops._registry import REGISTRY

    start = [normal(4, 9), normal(4, 9), normal(4, 9), torch.rand(4, 9), normal(4, 9)]  # grad, var, m, v, s
    ours, truth = ([value.clone() for value in start] for _ in "ab")
    rest = (torch.tensor([3]), 1e-2, 0.9, 0.8, 0.95, 1e-8, mode, True, decay)
    body("ema_adamw_")(*ours, *rest)
    REGISTRY.operators["ema_adamw_"].reference(*truth, *rest)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0], start[0]), "the gradient is not changed"


@npu_semantics()
def test_quantised_products():
    import mindspeed.ops.quant_gmm
    import mindspeed.ops.weight_quant_gmm  # noqa: F401

    x, weight = (torch.randint(-9, 9, shape, dtype=torch.int8) for shape in ((12, 16), (3, 16, 8)))
    groups, bias = torch.tensor([3, 3, 10]), torch.randint(-9, 9, (3, 8), dtype=torch.int32)
    per_token, scale = torch.rand(12), torch.rand(3, 1) / 8
    assert_same("quant_gmm", x, weight, scale, per_token, bias, groups, 0, torch.float16, 1)
    bits = scale.view(torch.int32).long()
    assert_same("quant_gmm", x, weight, bits, None, bias, groups, 0, torch.int8, 0)
    float_x, scales, offsets = normal(12, 16, dtype=BF16), normal(3, 8, dtype=BF16) / 8, normal(3, 8, dtype=BF16)
    for offset in (None, offsets):
        assert_same("weight_quant_gmm", float_x, weight, scales, offset, normal(3, 8), groups, 0)


@npu_semantics()
def test_token_permutation():
    import mindspeed.ops.moe_routing_map  # noqa: F401

    tokens, indices, probs = normal(9, 16), torch.randint(0, 5, (9, 2)), torch.rand(9, 2)
    for count in (18, 11):
        permuted, order = assert_same("moe_token_permute", tokens, indices, count)
        row_map, dense = order.view(9, 2), count == 18
        for index in (0, 1) if dense else (1,):  # the kernel, and the form for maps with gaps
            assert_same("moe_token_permute_backward", normal(count, 16), row_map, index=index)
            assert_same("moe_token_unpermute", permuted, row_map, probs, index=index)
            assert_same("moe_token_unpermute_backward", normal(9, 16), permuted, row_map, probs, count, index=index)
    assert_same("moe_token_unpermute_backward", normal(9, 16), None, row_map, probs, 11, index=1)

    row_map = torch.full((9, 4), -1, dtype=torch.int32)
    row_map.flatten()[torch.randperm(36)[:11]] = torch.arange(11, dtype=torch.int32)
    assert_same("moe_token_unpermute", normal(11, 16), row_map, None, index=1)
    assert_same("moe_permute_map_backward", normal(11, 16), normal(11), row_map)


@npu_semantics()
@pytest.mark.parametrize("bias_dtype", [BF16, FP32])
@pytest.mark.parametrize("activation", ["None", "GeLU", "SiLU", "ReLU", "FastGeLU"])
def test_expert_dispatch(activation, bias_dtype):
    import torch.distributed as dist

    import mindspeed.ops.npu_all_to_all_all_gather_bmm as op

    x, weight, bias = normal(4, 6, 8, dtype=BF16), normal(4, 8, 10, dtype=BF16), normal(4, 1, 10, dtype=bias_dtype)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options = {"bias": bias, "shard_type": 1, "act_type": activation}
        for wanted in (False, True):
            options |= {"need_allgather_out": wanted, "need_activation_feature": wanted}
            ours, truth = (run(x, weight, "0", 1, "0", 1, **options) for run in (body(op.OP), op._reference))
            torch.testing.assert_close(ours, truth, rtol=1.6e-2, atol=1.6e-2)
    finally:
        dist.destroy_process_group()


@npu_semantics()
@pytest.mark.parametrize("layout", ["SBH", "TND"])
def test_ring_update(layout):
    import mindspeed.ops.npu_ring_attention_update  # noqa: F401

    out, stat = ((7, 2, 3 * 64), (2, 3, 7)) if layout == "SBH" else ((14, 3, 64), (14, 3))
    sides = [
        (normal(*out), *(value.unsqueeze(-1).expand(*stat, 8) for value in (normal(*stat), torch.rand(stat)))) for _ in "ab"
    ]
    assert_same("ring_attention_update", *sides[0], *sides[1], None, layout, "" if layout == "SBH" else "TND")
