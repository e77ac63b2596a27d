"""The CUDA platform on a GPU: torch's own answers, and nothing changed."""

import subprocess
import sys

import pytest
import torch

from mindspeed.patching.ledger import Ledger
from mindspeed.platform.cuda import Cuda

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.cuda
@on_gpu
def test_answers_of_a_gpu():
    cuda = Cuda()
    assert cuda.available() and cuda.device().type == "cuda" and cuda.device(0) == torch.device("cuda", 0)
    stream, begin, end = cuda.stream(), cuda.event(timing=True), cuda.event(timing=True)
    with cuda.on_stream(stream):
        assert cuda.current_stream() == stream
        begin.record()
        x = torch.zeros(2**20, device=cuda.device())
        end.record()
    cuda.synchronize()
    assert begin.elapsed_time(end) >= 0
    stats = cuda.memory_stats()
    assert stats.total > stats.reserved >= stats.current >= x.numel() * 4 and stats.peak >= stats.current
    del x
    cuda.reset_peak_memory()
    assert cuda.memory_stats().peak < stats.peak
    state = cuda.rng_state()
    drawn = torch.rand(4, device="cuda")
    cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), drawn)


@pytest.mark.cuda
@on_gpu
def test_cpu_can_be_forced_beside_a_gpu():
    code = (
        "import mindspeed.platform as p, torch; assert p.current().name == 'cpu'; assert not torch.cuda.is_available();"
        "from mindspeed.patching.ledger import Ledger; p.current().activate(Ledger());"
        "assert torch.zeros(2, device='cuda').device.type == 'cpu' and torch.cuda.device_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], env={"MINDSPEED_PLATFORM": "cpu"}, check=True, timeout=120)


def test_cuda_changes_nothing():
    ledger = Ledger()
    before = dict(vars(torch)), dict(vars(torch.cuda)), dict(vars(torch.distributed))
    Cuda().activate(ledger)
    assert len(ledger.rows) == 0
    after = dict(vars(torch)), dict(vars(torch.cuda)), dict(vars(torch.distributed))
    assert all(a[key] is b[key] for a, b in zip(before, after, strict=True) for key in a)


@pytest.mark.parametrize(
    ("model", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 156),
        ("NVIDIA A100-SXM4-40GB", torch.int8, None),
        ("NVIDIA GeForce RTX 9999", torch.float16, None),
    ],
)
def test_peaks_are_found_by_the_models_name(monkeypatch, model, dtype, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: model)
    found = Cuda().peak_flops(dtype)
    assert found == (None if teraflops is None else teraflops * 1e12)


def test_fp8_needs_a_recent_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "compute capability 8.9" in Cuda().why_not("fp8") and Cuda().supports("graphs")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert Cuda().supports("fp8")
