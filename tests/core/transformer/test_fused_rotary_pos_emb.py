import argparse
from types import SimpleNamespace

import pytest
import torch

import mindspeed
from mindspeed.core.transformer.fused_rotary_pos_emb import UTILS, FusedRotaryPosEmb, RotaryFlags, why_ours
from mindspeed.host.megatron_defaults import HostDefaults
from mindspeed.patching import NoFlags, RunShape
from tests.core.transformer.fused_runs import LAYOUTS, assert_fused_trains_the_same

ON = RotaryFlags(use_fused_rotary_pos_emb=True)


def shape(platform="cpu", given=(), **changes):
    values = {"position_embedding_type": "rope", "apply_rope_fusion": True, "transformer_impl": "local", **changes}
    return RunShape(argparse.Namespace(**values), platform, frozenset(given))


def problems(run):
    return [str(problem) for problem in FusedRotaryPosEmb().check(ON, run)]


def test_a_request_is_granted_or_refused_with_the_reason():
    assert problems(shape()) == problems(shape(position_embedding_type="mrope", apply_rope_fusion=False)) == []
    (message,) = problems(shape(position_embedding_type="learned_absolute"))
    assert message.startswith(
        "--use-fused-rotary-pos-emb: needs --position-embedding-type rope or mrope (given learned_absolute)"
    )
    (message,) = problems(shape(given={"apply_rope_fusion"}, apply_rope_fusion=False))
    assert "contradicted by --no-rope-fusion" in message
    (message,) = problems(shape(disable_fused_ops="rope"))
    assert "contradicted by --disable-fused-ops rope" in message


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (shape(), ""),
        (shape("npu"), "npu has a kernel (npu)"),
        (shape("npu", position_embedding_type="learned_absolute"), ""),
        (shape("npu", given={"apply_rope_fusion"}, apply_rope_fusion=False), ""),
        (shape("npu", disable_fused_ops="rope"), ""),
        (shape(given={"apply_rope_fusion"}), "apply_rope_fusion"),
        (shape(use_fused_rotary_pos_emb=True), "--use-fused-rotary-pos-emb"),
    ],
)
def test_flag_config_and_device_decide_in_this_order(monkeypatch, run, why):
    monkeypatch.setattr("mindspeed.core.transformer.fused_choice.device_kernel", lambda operator, device: device)
    assert why_ours(run) == why
    changed = [change.value for change in HostDefaults().normalise(NoFlags(), run) if change.dest == "apply_rope_fusion"]
    assert changed == ([] if why or not run.apply_rope_fusion else [False])


def test_host_s_fused_call_is_hidden_from_forms_that_it_refuses():
    run = shape(use_fused_rotary_pos_emb=True, multi_latent_attention=True)
    (change,) = (change for change in HostDefaults().normalise(NoFlags(), run) if change.dest == "apply_rope_fusion")
    assert change.value is False and "our operator serves its plain one" in change.because


def config(**changes):
    values = {"rotary_interleaved": False, "multi_latent_attention": False, "apply_rope_fusion": False, "mrope_section": None}
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def one_rank(tmp_path):
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_every_form_of_the_host_s_call_has_its_values(one_rank):
    from megatron.core.models.common.embeddings import rope_utils

    torch.manual_seed(0)
    t, packed = torch.randn(6, 2, 3, 16), torch.randn(6, 3, 16)
    freqs, own = torch.randn(6, 1, 1, 8), torch.randn(6, 2, 1, 16)
    lengths = torch.tensor([0, 4, 4, 6], dtype=torch.int32)
    filled = torch.tensor([0, 1, 6], dtype=torch.int32)  # the host's interleaved form stops at an empty sequence
    cases = [
        (t, freqs, config(), None, 1.0),
        (t, own, config(rotary_interleaved=True), None, 1.0),
        (t, freqs, config(multi_latent_attention=True), None, 0.7),
        (packed, freqs, config(), lengths, 1.0),
        (packed, freqs, config(rotary_interleaved=True), filled, 1.3),
    ]
    theirs = [rope_utils.apply_rotary_pos_emb(*case) for case in cases]
    with mindspeed.enabled(use_fused_rotary_pos_emb=True, position_embedding_type="rope") as handle:
        torch.testing.assert_close([rope_utils.apply_rotary_pos_emb(*case) for case in cases], theirs)
        cos, sin = torch.rand(6, 4), torch.rand(6, 4)
        rope_utils.apply_rotary_pos_emb_with_cos_sin(t, cos, sin)
        plain = rope_utils.fused_apply_rotary_pos_emb(t, freqs, transpose_output_memory=True)
        torch.testing.assert_close(plain, theirs[0])
        torch.testing.assert_close(rope_utils.fused_apply_rotary_pos_emb_thd(packed, lengths, freqs), theirs[3])
        assert handle.ledger.calls(f"{UTILS}:apply_rotary_pos_emb") == 5
        assert handle.ledger.calls(f"{UTILS}:_apply_rotary_pos_emb_bshd") == 1


def test_config_with_rope_fusion_means_ours_on_cpu():
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        TransformerConfig(**shape, apply_rope_fusion=True)
    with mindspeed.enabled(apply_rope_fusion=True) as handle:
        assert "fused-rotary-pos-emb" in handle.features
        assert TransformerConfig(**shape, apply_rope_fusion=True).apply_rope_fusion


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_host_s(layout):
    called = [f"{UTILS}:apply_rotary_pos_emb"]
    assert_fused_trains_the_same(layout, "--use-fused-rotary-pos-emb", ["fused-rotary-pos-emb"], called)
