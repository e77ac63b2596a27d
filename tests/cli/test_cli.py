"""Commands as a person meets them: what is on, what is refused, what to do next."""

import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mindspeed import __version__
from mindspeed.cli import app, doctor, explain, features, quickstart
from mindspeed.cli.messages import show_error
from mindspeed.errors import CheckpointError, ConfigError, Problem


@pytest.fixture
def console():
    return Console(width=160, record=True, file=open("/dev/null", "w"))


def text_of(run, console, *args):
    code = run(*args, console=console)
    return code, console.export_text()


def test_help_names_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("doctor", "features", "explain", "preprocess", "pretrain", "quickstart"):
        assert command in result.output


def test_the_version_is_told():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"mindspeed {__version__}\n"


def test_quickstart_refuses_wrong_counts_before_it_writes(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*--nproc 0: must be at least 1.*--train-iters -3"):
        quickstart.run([str(tmp_path / "run"), "--nproc", "0", "--train-iters", "-3"])
    assert list(tmp_path.iterdir()) == []


def test_help_of_training_shows_defaults_that_say_something():
    from mindspeed.training.arguments import build_parser

    text = build_parser().format_help()
    assert "(default: 10000)" in text and "default: None" not in text and "default: False" not in text


def test_doctor_finds_what_is_here(console):
    code, text = text_of(doctor.run, console)
    assert code == 0 and "Ready" in text
    for topic in ("torch", "megatron-core", "platform", "cpu, collectives over gloo"):
        assert topic in text


def test_doctor_refuses_a_platform_that_is_absent():
    command = [sys.executable, "-m", "mindspeed", "doctor"]
    result = subprocess.run(
        command,
        env={"MINDSPEED_PLATFORM": "npu", "PATH": "/usr/bin", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "MINDSPEED_PLATFORM=npu" in result.stdout and "torch" in result.stdout and "Not ready" in result.stdout


def test_features_are_listed_with_their_flags(console):
    code, text = text_of(features.run, console)
    assert code == 0 and "noop-layers" in text and "--noop-layers" in text


def test_one_feature_in_full(console):
    code, text = text_of(features.run, console, "--noop-layers")
    assert code == 0 and "Leave chosen layer slots empty" in text and "0-based" in text


def test_unknown_features_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"Did you mean noop-layers\?"):
        features.run("noop-layer")
    with pytest.raises(ConfigError, match=r"Choose one of .*noop-layers"):
        features.run("zzz")


def test_explain_shows_what_is_on_and_why(console):
    code, text = text_of(explain.run, console, ["--", "--num-layers", "8", "--noop-layers", "0,7"], False)
    assert code == 0
    assert "noop-layers" in text and "TransformerBlock._build_layers" in text and "builds nothing in an empty slot" in text
    assert "refused" not in text and "repair.norms" in text


def test_explain_names_flags_that_change_nothing(console):
    code, text = text_of(explain.run, console, ["--", "--num-layers", "8", "--cp-window-size", "2"], False)
    assert code == 0 and "--cp-window-size 2" in text and "no effect" in text and "--context-parallel-size above 1" in text
    code, text = text_of(explain.run, console, ["--", "--num-layers", "8", "--pre-tockens", "4"], False)
    assert code == 2 and "needs flash attention" in text and "no effect" not in text
    code, text = text_of(explain.run, console, ["--", "--num-layers", "8", "--context-parallel-size", "1"], False)
    assert code == 0 and "no effect" not in text


@pytest.fixture
def no_operator_has_run(monkeypatch):
    """As in a fresh process: the report tells what would be tried, not what other tests ran."""
    from mindspeed.ops._registry import REGISTRY

    for operator in REGISTRY.operators.values():
        monkeypatch.setattr(operator, "last", {})


def test_explain_names_the_kernel_of_each_operator_that_features_use(console, no_operator_has_run):
    argv = ["--", "--num-layers", "8", "--normalization", "RMSNorm", "--use-fused-rmsnorm"]
    code, text = text_of(explain.run, console, argv, False)
    assert code == 0
    served = [line for line in text.split("Kernels that serve them")[1].splitlines() if "│" in line]
    assert ["fused-rmsnorm", "rms_norm", "cpu", "aten", "first of the bodies for cpu"] in [
        [cell.strip() for cell in line.strip("│").split("│")] for line in served
    ]
    assert "swiglu" not in text
    argv += ["--disable-fused-ops", "rmsnorm,wgrad"]
    code, text = text_of(explain.run, console, argv, False)
    assert code == 2 and "is contradicted by --disable-fused-ops rmsnorm" in " ".join(text.split())
    assert "matmul_add_" not in text.split("Kernels that serve them")[-1]


def test_explain_lists_repairs_with_reasons(console):
    code, text = text_of(explain.run, console, ["--num-layers", "8"], True)
    assert code == 0 and "Always: platform and repairs" in text and "WrappedTorchNorm" in text


def test_explain_shows_what_is_refused_and_how_to_mend_it(console):
    code, text = text_of(explain.run, console, ["--num-layers", "8", "--noop-layers", "0,9"])
    assert code == 2
    assert "refused" in text and "position 9 is outside --num-layers 8" in text and "use positions 0 to 7" in text


def test_level_0_switches_features_off_and_says_so(console):
    code, text = text_of(explain.run, console, ["--num-layers", "8", "--optimization-level", "0"])
    assert code == 0 and "noop-layers" not in text
    console.clear()
    code, text = text_of(explain.run, console, ["--num-layers", "8", "--optimization-level", "0", "--noop-layers", "0"])
    assert code == 2 and "needs --optimization-level 2 (given 0)" in text


def test_explain_sets_flags_of_megatron_lm_aside(console):
    code, text = text_of(explain.run, console, ["--num-layers", "8", "--wandb-project", "x", "--noop-layers", "1"])
    assert code == 0 and "not examined: --wandb-project" in text


def test_explain_suggests_near_flags(console):
    code, text = text_of(explain.run, console, ["--num-layer", "8"])
    assert code == 2 and "--num-layers" in text


def test_explain_leaves_nothing_behind(console):
    import torch

    before = torch.cuda.current_device
    explain.run(["--num-layers", "8", "--noop-layers", "1"], console=console)
    assert torch.cuda.current_device is before


def test_errors_are_shown_as_a_table_or_a_panel(console):
    show_error(
        ConfigError([Problem("--a", 3, "must be even", "use 2 or 4"), Problem("--b", True, "is unknown", "remove it")]), console
    )
    show_error(CheckpointError("iter_0000007/x.pt is damaged"), console)
    text = console.export_text()
    assert "2 problems with this configuration" in text and "--a 3" in text and "use 2 or 4" in text
    assert "checkpoint error" in text and "is damaged" in text


def test_page_of_all_features_is_up_to_date():
    from pathlib import Path

    from mindspeed.patching.discovery import all_features

    page = Path(__file__).parents[2] / "docs" / "features" / "index.md"
    assert page.read_text(encoding="utf-8") == features.markdown_page(all_features()), (
        "run: mindspeed features --markdown > docs/features/index.md"
    )
