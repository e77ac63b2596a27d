"""The wrapper modules against the host's unfused formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mindspeed.core.fusions import fused_bias_swiglu, fused_layer_norm, fused_rope, fused_softmax, grouped_matmul
from mindspeed.core.fusions.fused_rms_norm import RMSNorm
from mindspeed.testing.operators import assert_operator_accurate, kept_bytes, operator_calls

# --- RMSNorm


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("fused", [None, True, False])
def test_rms_norm_module(zero_centered, fused):
    config = SimpleNamespace(layernorm_zero_centered_gamma=zero_centered, use_fused_rmsnorm=fused, sequence_parallel=True)
    norm = RMSNorm(8, eps=1e-5, config=config)
    assert list(norm.state_dict()) == ["weight"]
    assert norm.weight.sequence_parallel is True
    x = torch.randn(3, 8)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(norm(x), expected)
    calls = operator_calls(lambda: norm(x))
    assert calls == ({} if fused is False else {"rms_norm": 1})


def test_rms_norm_marks_its_parameter_as_told():
    assert RMSNorm(4).weight.sequence_parallel is False
    assert RMSNorm(4, sequence_parallel=True).weight.sequence_parallel is True


# --- SwiGLU


def swiglu(x):
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_functions(dtype):
    x, bias, weights = (torch.randn(s).to(dtype).requires_grad_() for s in ((5, 12), (12,), (5, 1)))
    module = fused_bias_swiglu
    assert_operator_accurate(lambda x: module.SwiGLUFunction.apply(x, False), swiglu, x)
    assert_operator_accurate(lambda x, b: module.BiasSwiGLUFunction.apply(x, b, False), lambda x, b: swiglu(x + b), x, bias)
    assert_operator_accurate(
        lambda x, w: module.WeightedSwiGLUFunction.apply(x, w, False), lambda x, w: swiglu(x) * w, x, weights
    )
    torch.testing.assert_close(module.fused_swiglu(x), module.SwiGLUFunction.apply(x))


def test_swiglu_keeps_its_input_in_8_bits_when_asked_to():
    x = torch.randn(64, 12, dtype=torch.bfloat16, requires_grad=True)
    run = lambda: fused_bias_swiglu.SwiGLUFunction.apply(x, True)  # noqa: E731
    assert kept_bytes(run) == 64 * 12
    run().sum().backward()
    rounded = x.detach().to(torch.float8_e4m3fn).to(torch.bfloat16).requires_grad_()
    fused_bias_swiglu.SwiGLUFunction.apply(rounded, False).sum().backward()
    assert torch.equal(x.grad, rounded.grad)


# --- rotary position embedding


def host_rope(t, freqs, interleaved, latent, mscale):
    size = freqs.shape[-1]
    t, rest = t[..., :size], t[..., size:]
    if latent:
        t = torch.cat([t[..., 0::2], t[..., 1::2]], -1)
    if interleaved:
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)
    else:
        turned = torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1)
    return torch.cat([t * freqs.cos() * mscale + turned * freqs.sin() * mscale, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_rope(interleaved, latent, size, batch):
    t, freqs = torch.randn(6, 2, 3, 8, requires_grad=True), torch.randn(6, batch, 1, size)
    assert_operator_accurate(
        lambda t: fused_rope.apply_rotary_pos_emb_bshd(t, freqs, interleaved, latent, 1.3),
        lambda t: host_rope(t, freqs.to(t.dtype), interleaved, latent, 1.3),
        t,
    )
    config = SimpleNamespace(rotary_interleaved=interleaved, multi_latent_attention=latent)
    torch.testing.assert_close(fused_rope.apply_rotary_pos_emb(t, freqs, config), host_rope(t, freqs, interleaved, latent, 1.0))


def test_rope_tables_are_computed_once_per_table_of_angles():
    freqs = torch.randn(6, 1, 1, 8)
    first = fused_rope.TABLES.get(freqs, torch.bfloat16, 1.0)
    assert fused_rope.TABLES.get(freqs, torch.bfloat16, 1.0) is first
    assert fused_rope.TABLES.get(freqs, torch.float32, 1.0)[0].dtype == torch.float32
    assert fused_rope.TABLES.get(freqs, torch.bfloat16, 2.0) is not first
    freqs.add_(1)
    torch.testing.assert_close(fused_rope.TABLES.get(freqs, torch.float32, 1.0)[0], freqs.cos())
    count = len(fused_rope.TABLES.by_angles)
    del freqs
    assert len(fused_rope.TABLES.by_angles) == count - 1


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_packed_rope(cp_size):
    lengths = [8, 0, 16, 8]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    freqs = torch.randn(16, 1, 1, 4)
    for rank in range(cp_size):
        local = [length // cp_size for length in lengths]
        t = torch.randn(sum(local), 2, 6)
        parts = []
        for part in t.split(local):
            segment, full = len(part) // 2, cp_size * len(part)
            angles = freqs[: len(part)]
            if cp_size > 1:
                angles = torch.cat(
                    [freqs[rank * segment : (rank + 1) * segment], freqs[full - (rank + 1) * segment : full - rank * segment]]
                )
            parts.append(host_rope(part.unsqueeze(1), angles, False, False, 1.0).squeeze(1))
        config = SimpleNamespace(rotary_interleaved=False)
        ours = fused_rope.apply_rotary_pos_emb(t, freqs, config, cu, cp_rank=rank, cp_size=cp_size)
        torch.testing.assert_close(ours, torch.cat(parts))


def test_packed_rope_is_one_launch_whatever_the_number_of_sequences():
    cu = torch.tensor([0, 3, 3, 7, 12, 13], dtype=torch.int32)
    t, freqs = torch.randn(13, 2, 6), torch.randn(8, 1, 1, 4)
    config = SimpleNamespace(rotary_interleaved=False)
    calls = operator_calls(lambda: fused_rope.apply_rotary_pos_emb(t, freqs, config, cu))
    assert calls == {"rotary": 1}
    lengths = fused_rope.packed_positions(cu.to("meta"), 13, cp_rank=1, cp_size=2)  # no value is read on the host
    assert lengths.shape == (13,)


# --- softmax, LayerNorm, grouped products


def test_softmax_classes():
    x, mask = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 4, 4) < 0.3
    mask[..., 0] = False
    scores = x * 0.5
    torch.testing.assert_close(fused_softmax.ScaledSoftmax.apply(x, 0.5), scores.softmax(-1))
    masked = scores.masked_fill(mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(fused_softmax.ScaledMaskedSoftmax.apply(x, mask, 0.5), masked)
    causal = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    torch.testing.assert_close(fused_softmax.ScaledUpperTriangMaskedSoftmax.apply(x.flatten(0, 1), 0.5), causal.flatten(0, 1))


def test_layer_norm_names():
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(4), torch.randn(4)
    expected = F.layer_norm(x, (4,), weight, bias, 1e-5)
    module = fused_layer_norm
    torch.testing.assert_close(module.FastLayerNormFN.apply(x, weight, bias, 1e-5), expected)
    torch.testing.assert_close(module.FusedLayerNormAffineFunction.apply(x, weight, bias, torch.Size([4]), 1e-5), expected)
    torch.testing.assert_close(module.fused_layer_norm_affine(x, weight, bias, 4, 1e-5), expected)
    weight = torch.randn(3, 4)
    torch.testing.assert_close(
        module.fused_layer_norm_affine(x, weight, weight, (3, 4), 1e-5), F.layer_norm(x, (3, 4), weight, weight, 1e-5)
    )
    with pytest.raises(ValueError, match=r"input must end in shape \(5,\), got \(2, 3, 4\)"):
        module.fused_layer_norm_affine(x, weight, None, 5)
    with pytest.raises(ValueError, match="memory_efficient_layer_norm"):
        module.FastLayerNormFN.apply(x, weight, bias, 1e-5, True)


@pytest.mark.parametrize("trans_b", [False, True])
def test_grouped_products(trans_b):
    a, b = torch.randn(6, 4, requires_grad=True), torch.randn(2, 4, 5)
    sizes = torch.tensor([2, 4])
    expected = torch.cat([a[:2] @ b[0], a[2:] @ b[1]])
    given = b.transpose(1, 2).contiguous() if trans_b else b
    torch.testing.assert_close(grouped_matmul.Ops.gmm(a, given, sizes, trans_b), expected)
    assert grouped_matmul.grouped_gemm_is_available()
    weight = torch.nn.Parameter(b.clone())
    weight.main_grad = torch.zeros(2, 4, 5)
    grouped_matmul.Ops.gmm(a, weight, sizes, gemm_fusion=True, original_weight=weight).sum().backward()
    torch.testing.assert_close(weight.main_grad[1], a[2:].detach().sum(0).unsqueeze(1).expand(4, 5))
