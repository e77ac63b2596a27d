import argparse
from types import SimpleNamespace

import pytest

from mindspeed.core.memory.recompute_layers_per_pp_rank import EnableRecomputeLayersPerPpRank
from mindspeed.errors import ConfigError
from mindspeed.host import megatron_defaults, megatron_yaml
from mindspeed.host.megatron_defaults import HostDefaults
from mindspeed.patching import NoFlags, RunShape
from mindspeed.patching.activation import add_flags, given_flags

FEATURES = (EnableRecomputeLayersPerPpRank(),)
DEST = "enable_recompute_layers_per_pp_rank"


def merged(monkeypatch, words=(), **file):
    parser = add_flags(argparse.ArgumentParser(), FEATURES)
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    args = SimpleNamespace(**file)
    megatron_yaml.merge(args, parser, FEATURES, given_flags(parser, words))
    return args


def test_absent_names_get_their_defaults(monkeypatch):
    args = merged(monkeypatch, language_model=SimpleNamespace(num_layers=2))
    assert getattr(args, DEST) is False and args.optimization_level == 2


def test_names_may_stand_at_the_top_in_the_host_s_sections_or_in_ours(monkeypatch):
    assert getattr(merged(monkeypatch, **{DEST: True}), DEST)
    assert getattr(merged(monkeypatch, model_parallel=SimpleNamespace(**{DEST.replace("_", "-"): True})), DEST)
    args = merged(monkeypatch, **{DEST: True, "mindspeed": SimpleNamespace(**{DEST: False})})
    assert getattr(args, DEST) is False and not hasattr(args, "mindspeed"), "our own section is stronger"


def test_command_line_wins_over_the_file(monkeypatch):
    args = merged(monkeypatch, ["--optimization-level", "1"], mindspeed=SimpleNamespace(optimization_level=0))
    assert args.optimization_level == 1


def test_unknown_name_in_our_section_is_told_with_the_nearest(monkeypatch):
    with pytest.raises(
        ConfigError, match="mindspeed: optimisation_level: is not a flag of mindspeed. Did you mean optimization_level"
    ):
        merged(monkeypatch, mindspeed=SimpleNamespace(optimisation_level=1))


def shape(platform="cpu", given=(), **args):
    return RunShape(argparse.Namespace(**args), platform, frozenset(given))


def changes(run):
    return {change.dest: change.value for change in HostDefaults().normalise(NoFlags(), run)}


def problems(run):
    return [str(problem) for problem in HostDefaults().check(NoFlags(), run)]


def test_defaults_that_assume_cuda_become_what_is_there():
    run = {"distributed_backend": "nccl", "transformer_impl": "transformer_engine", "apply_rope_fusion": True}
    assert changes(shape(**run)) == {"distributed_backend": "gloo", "transformer_impl": "local", "apply_rope_fusion": False}
    assert "transformer_impl" not in changes(shape(given=["transformer_impl"], **run)), "an explicit wish is not rewritten"
    assert changes(shape("cuda", **run)) == {"transformer_impl": "local", "apply_rope_fusion": False}


def test_transformer_engine_asked_for_and_absent_is_an_error_everywhere():
    for platform in ("cpu", "cuda"):
        (message,) = problems(shape(platform, ["transformer_impl"], transformer_impl="transformer_engine"))
        assert "--transformer-impl transformer_engine" in message and "use --transformer-impl local" in message.lower().replace(
            "Use", "use"
        )


@pytest.mark.parametrize(("size", "refused"), [(1000, True), (4095, True), (4096, False), (None, False)])
def test_mock_data_needs_a_vocabulary_that_holds_its_tokens(size, refused):
    run = shape(mock_data=True, tokenizer_type="NullTokenizer", vocab_size=size)
    assert bool(problems(run)) is refused


def test_sequence_parallelism_needs_equal_parts_unless_unaligned():
    run = {"sequence_parallel": True, "tensor_model_parallel_size": 4, "seq_length": 62}
    (message,) = problems(shape(**run))
    assert message.startswith("--seq-length 62") and "Use 60, or --unaligned-linear" in message
    assert problems(shape(**run, unaligned_linear=True)) == []


def test_load_directory_must_exist_unless_it_is_where_the_run_saves(tmp_path):
    absent = str(tmp_path / "absent")
    (message,) = problems(shape(load=absent, save=str(tmp_path)))
    assert message.startswith(f"--load {absent}: there is no such directory")
    assert problems(shape(load=absent, save=str(tmp_path / "x" / ".." / "absent"))) == []
    assert problems(shape(load=str(tmp_path))) == [] and problems(shape(load=None)) == []
    assert problems(shape(load=absent, pretrained_checkpoint="elsewhere")) == []


@pytest.mark.parametrize(("platform", "there", "after"), [("cpu", None, "1"), ("npu", "8", "8"), ("cuda", None, None)])
def test_one_connection_is_set_where_it_means_nothing(monkeypatch, platform, there, after):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    if there is not None:
        monkeypatch.setenv(name, there)
    megatron_defaults.allow_one_connection(platform)
    import os

    assert os.environ.get(name) == after
    if there is None and after is not None:
        monkeypatch.delenv(name)
