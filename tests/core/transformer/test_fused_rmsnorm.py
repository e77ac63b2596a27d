import argparse
from types import SimpleNamespace

import pytest
import torch

import mindspeed
from mindspeed.core.transformer.fused_rmsnorm import FusedRmsnorm, RmsnormFlags, build_norm
from mindspeed.patching import RunShape
from mindspeed.testing.parity import assert_same_training
from tests.core.transformer.fused_runs import LAYOUTS, TENSOR, assert_fused_trains_the_same

TARGET = "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"


def problems(platform="cpu", **changes):
    args = argparse.Namespace(**{"normalization": "RMSNorm", "transformer_impl": "local", **changes})
    feature = FusedRmsnorm()
    return [str(problem) for problem in feature.check(RmsnormFlags(use_fused_rmsnorm=True), RunShape(args, platform))]


def test_a_request_is_granted_or_refused_with_the_reason():
    assert problems() == []
    assert problems(normalization="LayerNorm") == [
        "--use-fused-rmsnorm: needs --normalization RMSNorm (given LayerNorm). Add --normalization RMSNorm or remove "
        "--use-fused-rmsnorm."
    ]
    (message,) = problems(tp_2d=True)
    assert "--tp-2d has norms of its own" in message
    (message,) = problems(no_persist_layer_norm=True)
    assert "contradicted by --no-persist-layer-norm" in message
    (message,) = problems(disable_fused_ops="swiglu, rmsnorm")
    assert "contradicted by --disable-fused-ops rmsnorm" in message


@pytest.mark.parametrize(
    ("changes", "on"),
    [
        ({}, True),
        ({"normalization": "LayerNorm"}, False),
        ({"no_persist_layer_norm": True}, False),
        ({"disable_fused_ops": "rmsnorm"}, False),
        ({"tp_2d": True}, False),
    ],
)
def test_without_the_flag_the_device_decides(monkeypatch, changes, on):
    monkeypatch.setattr("mindspeed.core.transformer.fused_choice.device_kernel", lambda operator, device: "npu")
    args = argparse.Namespace(**{"normalization": "RMSNorm", "transformer_impl": "local", **changes})
    why = FusedRmsnorm().why(RmsnormFlags(), RunShape(args, "npu"))
    assert why == ("npu has a kernel (npu)" if on else "")
    assert FusedRmsnorm().why(RmsnormFlags(), RunShape(args, "cpu")) == ""
    assert FusedRmsnorm().why(RmsnormFlags(use_fused_rmsnorm=True), RunShape(args, "cpu")) == "--use-fused-rmsnorm"


@pytest.mark.parametrize("zero_centred", [False, True])
def test_norm_is_ours_marked_and_equal_to_the_formula(zero_centred):
    config = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=zero_centred, sequence_parallel=True, persist_layer_norm=True
    )
    norm = build_norm(lambda *_: pytest.fail("the host's"), object, config=config, hidden_size=8, eps=1e-5)
    assert [name for name, _ in norm.named_parameters()] == ["weight"] and norm.weight.sequence_parallel is True
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-5))


def test_other_norms_stay_the_host_s():
    seen = []
    config = SimpleNamespace(normalization="LayerNorm")
    assert (
        build_norm(lambda *args: seen.append(args) or "theirs", object, config, 8, 1e-6, zero_centered_gamma=True) == "theirs"
    )
    assert seen == [(object, config, 8, 1e-6, False, True, "LayerNorm")]


def test_other_norms_of_the_host_pass_through_and_unkept_wishes_are_refused():
    from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm

    wishes = {"layernorm_zero_centered_gamma": False, "sequence_parallel": True, "persist_layer_norm": False}
    with mindspeed.enabled(normalization="RMSNorm", use_fused_rmsnorm=True):
        config = SimpleNamespace(normalization="L2Norm", memory_efficient_layer_norm=False, **wishes)
        assert type(WrappedTorchNorm(config=config, hidden_size=8)) is L2Norm
        config = SimpleNamespace(normalization="LayerNorm", memory_efficient_layer_norm=False, **wishes)
        assert [p.sequence_parallel for p in WrappedTorchNorm(config=config, hidden_size=8).parameters()] == [True, True]
        config = SimpleNamespace(normalization="RMSNorm", memory_efficient_layer_norm=True, **wishes)
        with pytest.raises(ValueError, match="memory_efficient_layer_norm: the fused RMSNorm keeps its input"):
            WrappedTorchNorm(config=config, hidden_size=8)


LATENT = "--multi-latent-attention --kv-lora-rank 16 --v-head-dim 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8"


@pytest.mark.parametrize(("flags", "norms"), [("--qk-layernorm", 9), (f"{LATENT} --q-lora-rank 16 --qk-layernorm", 9)])
def test_norms_inside_of_attention_come_from_the_same_place(flags, norms):
    """Two layers with two norms each and two more around queries and keys, and the last norm."""
    common = f"--num-layers 2 --normalization RMSNorm --position-embedding-type rope {flags}"
    _, second = assert_same_training("", "--use-fused-rmsnorm", 1, steps=3, common=common, called=[TARGET], rtol=1e-5)
    assert [row.calls for row in second.patches if row.target == TARGET and row.owner == "fused-rmsnorm"] == [norms]


def test_host_builds_it_while_the_feature_is_on():
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from mindspeed.core.fusions.fused_rms_norm import RMSNorm

    config = SimpleNamespace(
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=False,
        sequence_parallel=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
    )
    with mindspeed.enabled(normalization="RMSNorm", use_fused_rmsnorm=True) as handle:
        assert isinstance(WrappedTorchNorm(config=config, hidden_size=8), RMSNorm)
        assert handle.ledger.calls(TARGET)
    with mindspeed.enabled(normalization="RMSNorm"):
        assert type(WrappedTorchNorm(config=config, hidden_size=8)) is torch.nn.RMSNorm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_host_s(layout):
    assert_fused_trains_the_same(layout, "--use-fused-rmsnorm", ["fused-rmsnorm"], [TARGET])


def test_layer_norm_with_sequence_parallelism_trains_like_one_rank():
    assert_same_training("", f"{TENSOR} --sequence-parallel", 1, 2, steps=10, common="--num-layers 2")
