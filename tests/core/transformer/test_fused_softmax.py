import argparse

import pytest
import torch

import mindspeed
from mindspeed.core.transformer.fused_softmax import HOST, FusedSoftmax
from mindspeed.patching import NoFlags, RunShape
from mindspeed.testing.parity import train

MODULE = f"{HOST}:FusedScaleMaskSoftmax"


@pytest.mark.parametrize(
    ("platform", "given", "changes", "why"),
    [
        ("npu", (), {}, "npu has a kernel (npu)"),
        ("cpu", (), {}, ""),
        ("cpu", ("masked_softmax_fusion",), {}, "masked_softmax_fusion"),
        ("npu", (), {"masked_softmax_fusion": False}, ""),
        ("npu", (), {"bf16": False}, ""),
        ("npu", (), {"use_flash_attn": True}, ""),
        ("npu", (), {"disable_fused_ops": "softmax"}, ""),
    ],
)
def test_device_config_and_flags_of_the_host_decide(monkeypatch, platform, given, changes, why):
    monkeypatch.setattr("mindspeed.core.transformer.fused_choice.device_kernel", lambda operator, device: device)
    args = argparse.Namespace(**{"masked_softmax_fusion": True, "bf16": True, "fp16": False, **changes})
    assert FusedSoftmax().why(NoFlags(), RunShape(args, platform, frozenset(given))) == why


def host_module(kind, fusion=True, bits16=True):
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType

    def fill(scores, mask):
        return scores.masked_fill(mask, -10000.0)

    return FusedScaleMaskSoftmax(False, bits16, AttnMaskType[kind], fusion, fill, True, 0.5)


def test_probabilities_and_gradients_are_the_host_s():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 5).bfloat16()
    some = torch.rand(2, 1, 5, 5) > 0.7
    some[..., 0] = False
    with mindspeed.enabled(masked_softmax_fusion=True) as handle:
        for kind, mask in (("causal", None), ("causal", some), ("padding", some), ("no_mask", None)):
            module = host_module(kind)
            results = []
            for compute in (module.forward_torch_softmax, module.forward):
                leaf = scores.clone().requires_grad_()
                out = compute(leaf, mask)
                out.backward(torch.arange(150.0).view_as(out).bfloat16() / 150)
                results.append((out.detach(), leaf.grad))
            torch.testing.assert_close(*results, rtol=0.02, atol=0.004)
        assert handle.ledger.calls(f"{MODULE}.forward_fused_softmax") == 4


def test_the_host_s_extension_is_never_asked(monkeypatch):
    """`get_batch_per_block` imports a compiled extension that only the host's own kernel needs."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax

    monkeypatch.setattr(FusedScaleMaskSoftmax, "get_batch_per_block", lambda *_: pytest.fail("asked"))
    with mindspeed.enabled(masked_softmax_fusion=True):
        for size in (5, 16, 64):
            scores = torch.randn(1, 2, size, size).bfloat16()
            assert host_module("causal").is_kernel_available(None, 1, 2, size, size)
            assert host_module("causal")(scores, None).shape == scores.shape


def test_other_precisions_and_shapes_go_to_the_host_s_formula():
    with mindspeed.enabled(masked_softmax_fusion=True):
        assert not host_module("causal", bits16=False).is_kernel_available(None, 1, 1, 4, 4)
        assert not host_module("causal", fusion=False).is_kernel_available(None, 1, 1, 4, 4)
        assert not host_module("causal").is_kernel_available(None, 1, 1, 1, 4)
        assert host_module("padding").is_kernel_available(None, 1, 1, 1, 4)


def test_classes_of_the_host_have_its_values():
    from megatron.core.fusions import fused_softmax

    x, mask = torch.randn(2, 2, 4, 4), torch.rand(2, 1, 4, 4) > 0.8
    with mindspeed.enabled(masked_softmax_fusion=True):
        torch.testing.assert_close(fused_softmax.ScaledSoftmax.apply(x, 2.0), (2 * x).softmax(-1))
        whole = (2 * x).masked_fill(mask, float("-inf")).softmax(-1)
        torch.testing.assert_close(fused_softmax.ScaledMaskedSoftmax.apply(x, mask, 2.0), whole)
        causal = (2 * x).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(-1)
        torch.testing.assert_close(
            fused_softmax.ScaledUpperTriangMaskedSoftmax.apply(x.view(4, 4, 4), 2.0), causal.view(4, 4, 4)
        )


def test_training_in_16_bits_does_not_need_it_on_cpu():
    assert "fused-softmax" not in train("--bf16 --num-layers 1", steps=1).features
