"""scripts/gpu_check.sh without a GPU, and the summary that it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
ROWS = (
    {"started": "tests/a.py::test_one"},
    {"id": "tests/a.py::test_one", "outcome": "passed", "seconds": 1.5, "message": ""},
    {"started": "tests/a.py::test_three"},
    {"id": "tests/a.py::test_three", "outcome": "skipped", "seconds": 0.0, "message": "needs two"},
)
FAILED = [{"id": f"tests/a.py::test_two[{name}]", "outcome": "failed", "seconds": 0.1, "message": "wrong"} for name in "xy"]


def log(folder, rows):
    (folder / "tests-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def summarised(folder, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / "_gpu_summary.py"), str(folder), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result, json.loads((folder / "summary.json").read_text())


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
    log(tmp_path, (*ROWS, *(FAILED if test_code == 1 else ())))
    (tmp_path / "benchmarks.json").write_text(json.dumps({"schema": 1, "cases": [{"id": "ops.x", "verdict": verdict}]}))
    result, summary = summarised(tmp_path, "GPU", test_code, figure_code, 77)
    assert result.returncode == code
    assert summary["tests"]["failed"] == ({row["id"]: "wrong" for row in FAILED} if test_code == 1 else {})
    assert (summary["tests"]["passed"], summary["tests"]["skipped"], summary["seconds"], summary["gpu"]) == (1, 1, 77, "GPU")
    assert "ops.x" in result.stdout
    assert ("tests/a.py::test_two[x] and 1 more: wrong" in result.stdout) == (test_code == 1)
    assert ("stopped by the time limit" in result.stdout) == (test_code == 124)


def test_summary_of_a_run_that_produced_nothing(tmp_path):
    result, summary = summarised(tmp_path, "GPU", 124, 124, 540)
    assert result.returncode == 2 and summary["tests"]["finished"] is False


def test_summary_of_parts_that_were_stopped_while_they_wrote(tmp_path):
    log(tmp_path, (*ROWS, {"started": "tests/a.py::test_four"}))
    with (tmp_path / "tests-0.jsonl").open("a") as file:
        file.write('{"id": "tests/a.py::te')
    (tmp_path / "benchmarks.json").write_text('{"schema": 1, "cas')
    result, summary = summarised(tmp_path, "GPU", 124, 124, 540)
    assert (summary["tests"]["passed"], summary["tests"]["running"]) == (1, ["tests/a.py::test_four"])
    assert summary["benchmarks"]["cases"] == [] and "running tests/a.py::test_four" in " ".join(result.stdout.split())


def test_summary_shows_figures_and_leaves_out_cases_of_other_devices(tmp_path):
    log(tmp_path, ROWS)
    figure = {
        "id": "ops.cuda.x", "verdict": "missed", "ours": 0.25, "unit": "device ms", "fraction": 0.7, "must": 0.8, "aim": 0.9,
        "peers": {"eager": {"ratio": 2.0}, "liger": {"ratio": None}},
    }  # fmt: skip
    late = {"id": "ops.cuda.y", "verdict": "skipped", "reason": "after 9 s no case is begun"}
    other = {"id": "ops.z", "verdict": "skipped", "reason": "runs on cpu only"}
    (tmp_path / "benchmarks.json").write_text(json.dumps({"cases": [figure, late, other]}))
    result, _ = summarised(tmp_path, "GPU", 0, 1, 9)
    words = " ".join(result.stdout.split())
    assert "missed ops.cuda.x 0.2500 ms fraction 0.70 (must 0.8, aim 0.9) eager x2.00" in words
    assert "skipped ops.cuda.y after 9 s no case is begun" in words and "ops.z" not in words and "liger" not in words


@pytest.mark.parametrize(
    ("gpu", "copy", "odd"), [("NVIDIA H200", 4250, False), ("NVIDIA H200", 3000, True), ("Another", 3000, False)]
)
def test_summary_says_when_the_device_is_not_what_it_should_be(tmp_path, gpu, copy, odd):
    log(tmp_path, ROWS)
    report = {"cases": [{"id": "a", "verdict": "aim"}], "ceilings": {"copy_GBps": copy, "matmul_TFLOPs": {"bf16": 780}}}
    (tmp_path / "benchmarks.json").write_text(json.dumps(report))
    result, summary = summarised(tmp_path, gpu, 0, 0, 9)
    assert result.returncode == 0 and f"copy {copy} GB/s, bfloat16 product 780 TFLOP/s" in result.stdout
    assert ("odd machine" in result.stdout) == odd == summary["odd_machine"]


STAND_IN = """#!/bin/sh
case "$1" in
  -c) echo "Some GPU" ;;
  scripts/_gpu_summary.py) exec {} "$@" ;;
  *) exit 139 ;;
esac
"""


def test_parts_that_die_do_not_show_the_results_of_an_older_run(tmp_path):
    log(tmp_path, ROWS)
    (tmp_path / "benchmarks.json").write_text(json.dumps({"cases": [{"id": "a", "verdict": "aim"}]}))
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(sys.executable))
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": str(python)})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert result.returncode == 2
    assert (summary["tests"]["passed"], summary["benchmarks"]["cases"]) == (0, [])


SUITE = """
import os, time, pytest, torch
pytestmark = pytest.mark.cuda

class Lost:
    def __call__(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")

def test_fine(): pass
def test_wrong(): assert 1 == 2, "numbers differ"
def test_dies(): os._exit(139)
def test_after_death(): pass
def test_loses_the_gpu(): torch.cuda.synchronize = Lost()
def test_in_a_new_process(): assert not isinstance(torch.cuda.synchronize, Lost)
def test_skipped(): pytest.skip("needs two GPUs")
"""
TORCH = """
from types import SimpleNamespace
cuda = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, synchronize=lambda: None)
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """The runner of the tests, on a suite of its own instead of ours."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import _gpu_tests

    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "torch.py").write_text(TORCH)  # the real one takes seconds to import, in each process
    (tmp_path / "suite" / "pytest.ini").write_text("[pytest]\nmarkers = cuda: needs an NVIDIA GPU\n")
    monkeypatch.setattr(_gpu_tests, "ROOT", tmp_path / "suite")
    monkeypatch.setattr(_gpu_tests, "files", lambda root: ["test_suite.py"])
    return _gpu_tests, tmp_path


def test_a_test_that_takes_its_process_or_the_gpu_along_spoils_no_other(runner):
    gpu_tests, folder = runner
    (folder / "suite" / "test_suite.py").write_text(SUITE)
    assert gpu_tests.run(folder, 280.0, 1) == 1
    rows = gpu_tests.read(folder / "tests-0.jsonl")[0]
    found = {name.partition("::")[2]: (row["outcome"], row["message"]) for name, row in rows.items()}
    lost = "the GPU's context is lost: CUDA error: an illegal memory access was encountered"
    assert found == {
        "test_fine": ("passed", ""),
        "test_wrong": ("failed", "AssertionError: numbers differ"),
        "test_dies": ("failed", "the process died in this test"),
        "test_after_death": ("passed", ""),
        "test_loses_the_gpu": ("failed", lost),
        "test_in_a_new_process": ("passed", ""),
        "test_skipped": ("skipped", "Skipped: needs two GPUs"),
    }


def test_a_suite_that_cannot_begin_is_not_tried_for_ever(runner):
    gpu_tests, folder = runner
    (folder / "suite" / "test_suite.py").write_text("import no_such_module_here\n")
    assert gpu_tests.run(folder, 280.0, 1) == 2


def test_tests_that_are_out_of_time_are_stopped_with_what_they_have(runner, monkeypatch):
    gpu_tests, folder = runner
    log = folder / "tests-0.jsonl"

    def clock():
        return 100.0 if log.is_file() and "test_long" in log.read_text() else 0.0

    monkeypatch.setattr(gpu_tests, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    text = "import time, pytest\npytestmark = pytest.mark.cuda\ndef test_fine(): pass\ndef test_long(): time.sleep(600)\n"
    (folder / "suite" / "test_suite.py").write_text(text)
    assert gpu_tests.run(folder, 15.0, 1) == 124
    results, open_tests, finished = gpu_tests.read(log)
    assert [name.partition("::")[2] for name in (*results, *open_tests)] == ["test_fine", "test_long"] and not finished


def test_every_test_for_a_gpu_is_in_a_file_that_is_run():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from _gpu_tests import files
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    found = files(ROOT)
    assert {"tests/ops/test_attention_cuda.py", "tests/platform/test_cuda.py", "tests/ops_kernels/test_triton_cuda.py"} <= set(
        found
    )
    assert found[-2:] == ["tests/ops_kernels/test_flex_attention.py", "tests/ops_kernels/test_triton_cuda.py"]


MEASURED = {
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


@pytest.mark.parametrize("row", MEASURED)
def test_every_operator_is_measured_on_the_device_at_two_sizes(row):
    from benchmarks._case import cases_of, groups

    cases = {case.id: case for case in cases_of(name for name in groups()["ops"] if ".bench_cuda_" in name)}
    for pattern in MEASURED[row]:
        for way in ("forward", "backward"):
            found = cases[f"ops.cuda.{pattern.format(way=way)}"]
            assert found.devices == ("cuda",) and found.preset == "standard" and found.must is not None
