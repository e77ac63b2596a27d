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
