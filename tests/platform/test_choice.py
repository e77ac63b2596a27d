"""Which platform a process gets, and every way the wish can fail."""

import os
import subprocess
import sys

import pytest
import torch

import mindspeed.platform as platforms
from mindspeed.errors import PlatformError
from mindspeed.platform.base import CAPABILITIES
from mindspeed.platform.cpu import Cpu
from mindspeed.platform.cuda import Cuda
from mindspeed.platform.npu import Npu

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="checks a machine without a GPU")


def run_python(code, **environment):
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


@no_gpu
def test_auto_takes_the_first_platform_that_is_there(monkeypatch):
    assert isinstance(platforms.named("auto"), Cpu)
    monkeypatch.setattr(Cuda, "why_absent", lambda self: "")
    assert isinstance(platforms.named("auto"), Cuda)
    monkeypatch.setattr(Npu, "why_absent", lambda self: "")
    assert isinstance(platforms.named("auto"), Npu)


@no_gpu
def test_a_broken_installation_is_passed_over_aloud(monkeypatch, caplog):
    monkeypatch.setattr(Npu, "is_installed", lambda self: True)
    monkeypatch.setattr(Npu, "why_absent", lambda self: "torch_npu is installed but sees no NPU; check npu-smi info")
    assert platforms.named("auto").name == "cpu"
    assert "platform npu is passed over: torch_npu is installed but sees no NPU" in caplog.text
    monkeypatch.setattr(Cpu, "why_absent", lambda self: "no")
    with pytest.raises(PlatformError, match="no platform can be used"):
        platforms.named("auto")


@no_gpu
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", r"MINDSPEED_PLATFORM=tpu: must be one of npu, cuda, cpu, auto. Unset it"),
        ("cuda", r"MINDSPEED_PLATFORM=cuda: (torch .* is built without CUDA; install|torch sees no NVIDIA GPU; check)"),
    ],
)
def test_impossible_wishes_name_the_remedy(name, message):
    with pytest.raises(PlatformError, match=message):
        platforms.named(name)


def test_npu_without_torch_npu_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    version = torch.__version__.partition("+")[0]
    with pytest.raises(PlatformError, match=rf"torch_npu is not installed; pip install torch-npu=={version}"):
        platforms.named("npu")


def test_npu_that_does_not_import_says_why(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: object())

    def broken(name, package=None):
        raise OSError("libascendcl.so: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(PlatformError, match=r"libascendcl.so.*source CANN's set_env.sh"):
        platforms.named("npu")


def test_cpu_after_cuda_has_started_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(PlatformError, match="CUDA is already initialised in this process. Import mindspeed before"):
        platforms.named("cpu")


def test_cpu_beside_a_gpu_hides_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert platforms.named("cpu").name == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_cpu_that_cannot_hide_the_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(PlatformError, match="torch still sees a GPU; start with CUDA_VISIBLE_DEVICES=''"):
        platforms.named("cpu")


def test_the_environment_decides_at_the_first_question_and_once():
    code = (
        "import os, mindspeed.platform as p; os.environ['MINDSPEED_PLATFORM'] = 'cpu'; first = p.current();"
        "os.environ['MINDSPEED_PLATFORM'] = 'nonsense'; assert p.current() is first; print(first.name)"
    )
    assert run_python(code).stdout.strip() == "cpu"
    failed = run_python("import mindspeed.platform as p; p.current()", MINDSPEED_PLATFORM="gpu")
    assert failed.returncode and "MINDSPEED_PLATFORM=gpu: must be one of" in failed.stderr


def test_importing_has_no_effect():
    code = (
        "import os, torch; before = dict(vars(torch.cuda)), dict(os.environ);"
        "import mindspeed.platform;"
        "assert (dict(vars(torch.cuda)), dict(os.environ)) == before"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_use_platform_is_for_a_block():
    outside = platforms.current()
    with platforms.use_platform("cpu") as inside:
        assert platforms.current() is inside and inside is not outside
        with platforms.use_platform(Cuda()) as other:
            assert platforms.current() is other
    assert platforms.current() is outside


def test_answers_of_the_cpu(monkeypatch):
    cpu = Cpu()
    assert (cpu.name, cpu.device_type, cpu.backend, cpu.is_async) == ("cpu", "cpu", "gloo", False)
    assert cpu.device(3) == cpu.device() == torch.device("cpu") and cpu.device_count() == 1
    assert cpu.stream() == cpu.current_stream()
    with cpu.on_stream(cpu.stream()):
        cpu.synchronize()
    assert cpu.peak_flops(torch.float32) > 1e8
    monkeypatch.setenv("MINDSPEED_PEAK_TFLOPS", "312")
    assert cpu.peak_flops(torch.bfloat16) == 312e12
    monkeypatch.setenv("MINDSPEED_PEAK_TFLOPS", "many")
    with pytest.raises(PlatformError, match="MINDSPEED_PEAK_TFLOPS=many is not a number; give teraflops"):
        cpu.peak_flops(torch.bfloat16)
    assert "platform cpu" in cpu.describe() and torch.__version__ in cpu.describe()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_the_cpu_lacks_is_said_in_a_sentence(capability):
    cpu = Cpu()
    assert cpu.supports(capability) == (cpu.why_not(capability) == "")
    assert not cpu.supports(capability) and len(cpu.why_not(capability).split()) > 4


def test_unknown_capabilities_are_errors():
    with pytest.raises(KeyError, match="no capability 'wings'; there are graphs, fp8"):
        Cpu().supports("wings")
    assert "no fused rms_norm kernel for platform cpu" in Cpu().why_not("fused:rms_norm")
    assert Npu().supports("fused:no_such_operator") is False


def test_events_measure_time():
    cpu = Cpu()
    begin, end = cpu.event(timing=True), cpu.event(timing=True)
    begin.record()
    end.record(cpu.stream())
    assert 0 <= begin.elapsed_time(end) < 1000 and end.query()
    with pytest.raises(ValueError, match="enable_timing=True"):
        cpu.event().elapsed_time(end)
    with pytest.raises(RuntimeError, match="must be recorded"):
        begin.elapsed_time(cpu.event(timing=True))
    with pytest.raises(PlatformError, match="interprocess event needs a CUDA device"):
        torch_event = type(begin)
        torch_event(interprocess=True)
