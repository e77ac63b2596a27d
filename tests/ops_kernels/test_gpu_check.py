"""scripts/gpu_check.sh without a GPU, and the summary that it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_one"/><testcase classname="tests.a" name="test_two">{}</testcase>
<testcase classname="tests.a" name="test_three"><skipped/></testcase>
</testsuite></testsuites>"""


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "torch sees no NVIDIA GPU; check nvidia-smi" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_python_it_says_so():
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": "no-such-python"})
    assert result.returncode == 2
    assert "no-such-python is not on PATH" in result.stderr


@pytest.mark.parametrize(
    ("test_code", "figure_code", "verdict", "code"),
    [(0, 0, "ok", 0), (1, 0, "ok", 1), (0, 1, "missed", 1), (1, 3, "wrong", 3), (0, 2, "ok", 2), (124, 0, "ok", 2)],
)
def test_summary(tmp_path, test_code, figure_code, verdict, code):
    (tmp_path / "tests.xml").write_text(JUNIT.format("<failure/>" if test_code == 1 else ""))
    (tmp_path / "benchmarks.json").write_text(json.dumps({"schema": 1, "cases": [{"id": "ops.x", "verdict": verdict}]}))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "_gpu_summary.py"),
        str(tmp_path),
        "GPU",
        str(test_code),
        str(figure_code),
        "77",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tests"]["failed"] == (["tests.a::test_two"] if test_code == 1 else [])
    assert (summary["tests"]["skipped"], summary["seconds"], summary["gpu"]) == (1, 77, "GPU")
    assert ("ops.x" in result.stdout) == (verdict != "ok")
    assert ("stopped by the time limit" in result.stdout) == (test_code == 124)


def test_summary_of_a_run_that_produced_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "_gpu_summary.py"), str(tmp_path), "GPU", "124", "124", "540"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert json.loads((tmp_path / "summary.json").read_text())["tests"]["finished"] is False


@pytest.mark.parametrize(
    ("gpu", "copy", "odd"), [("NVIDIA H200", 4250, False), ("NVIDIA H200", 3000, True), ("Another", 3000, False)]
)
def test_summary_says_when_the_device_is_not_what_it_should_be(tmp_path, gpu, copy, odd):
    (tmp_path / "tests.xml").write_text(JUNIT.format(""))
    report = {"cases": [{"id": "a", "verdict": "aim"}], "ceilings": {"copy_GBps": copy, "matmul_TFLOPs": {"bf16": 780}}}
    (tmp_path / "benchmarks.json").write_text(json.dumps(report))
    command = [sys.executable, str(ROOT / "scripts" / "_gpu_summary.py"), str(tmp_path), gpu, "0", "0", "9"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and f"copy {copy} GB/s, bfloat16 product 780 TFLOP/s" in result.stdout
    assert ("odd machine" in result.stdout) == odd == json.loads((tmp_path / "summary.json").read_text())["odd_machine"]
    assert "  aim" not in result.stdout


STAND_IN = """#!/bin/sh
case "$1" in
  -c) echo "Some GPU" ;;
  scripts/_gpu_summary.py) exec {} "$@" ;;
  *) exit 139 ;;
esac
"""


def test_parts_that_die_do_not_show_the_results_of_an_older_run(tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT.format(""))
    (tmp_path / "benchmarks.json").write_text(json.dumps({"cases": [{"id": "a", "verdict": "aim"}]}))
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(sys.executable))
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": str(python)})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert result.returncode == 2
    assert (summary["tests"]["passed"], summary["benchmarks"]["cases"]) == (0, [])


ROWS = {
    "norms": ("rms_norm.{way}.4096", "rms_norm.{way}.8192", "rms_norm.{way}.fp32_weight", "layer_norm.{way}.8192"),
    "add-norms": ("add_rms_norm.{way}.4096", "add_rms_norm.{way}.8192", "dropout_add_rms_norm.{way}.8192"),
    "swiglu": ("swiglu.{way}.14336", "swiglu.{way}.28672"),
    "rotary": ("rotary.half.{way}", "rotary.interleaved.{way}", "rotary.half.packed.{way}"),
    "optimizers": ("adamw.fp32", "ema_adamw.fp32"),
    "permutation": ("permute.4096", "permute.8192", "unpermute.4096", "unpermute.8192"),
    "grouped products": ("gmm.8x8192", "gmm.64x1024", "gmm.256x64", "gmm.ragged"),
    "weight gradients": ("matmul_add.4096", "matmul_add.8192", "groupmatmul_add.8"),
    "attention": ("fusion_attention.{way}.4096", "fusion_attention.{way}.16384"),
    "ring update": ("ring_attention_update.8192", "ring_attention_update.16384"),
    "launch": ("launch.rms_norm",),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_operator_is_measured_on_the_device_at_two_sizes(row):
    from benchmarks._case import cases_of, groups

    cases = {case.id: case for case in cases_of(name for name in groups()["ops"] if ".bench_cuda_" in name)}
    for pattern in ROWS[row]:
        for way in ("forward", "backward"):
            found = cases[f"ops.cuda.{pattern.format(way=way)}"]
            assert found.devices == ("cuda",) and found.preset == "standard" and found.must is not None
