import importlib
import logging
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

import mindspeed.ops
from mindspeed.ops import _registry
from mindspeed.ops._registry import REGISTRY, backend_report, backends, parse_choices, register_kernel
from mindspeed.ops.rms_norm import rms_norm


def all_modules():
    return [
        name for _, name, _ in pkgutil.iter_modules(mindspeed.ops.__path__, "mindspeed.ops.") if not name.endswith("kernels")
    ]


@pytest.fixture
def extra_kernel():
    """Register a body of rms_norm on CPU under the name `lib` and take it away again."""
    kernels, calls = REGISTRY.operators["rms_norm"].kernels["cpu"], []
    before = list(kernels)

    def declines(x, weight, eps):
        return "the row is too short" if x.shape[-1] < 4 else None

    @register_kernel("rms_norm", "lib", devices=("cpu",), declines=declines, opt_in=True)
    def body(x, weight, eps):
        calls.append(x.shape)
        return _registry.REGISTRY.operators["rms_norm"].reference(x, weight, eps)

    yield calls
    kernels[:] = before
    REGISTRY.forget_routes()


def test_every_family_is_defined_and_every_operator_names_its_family():
    for module in all_modules():
        importlib.import_module(module)
    assert {operator.family for operator in REGISTRY.operators.values()} == set(_registry.FAMILIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rms_nrom=ref", "'rms_nrom' is no operator; use '\\*' or one of .*rms_norm"),
        ("rms_norm=fast", "must be <operator>=<choice> with a choice of auto, ref"),
        ("rms_norm", "must be <operator>=<choice>"),
        ("rms_norm=", "must be <operator>=<choice>"),
        ("=ref", "'' is no operator"),
        ("rms_norm=auto=ref", "must be <operator>=<choice>"),
        ("gmm=ref,RMS_NORM=ref", "'RMS_NORM' is no operator"),
    ],
)
def test_unknown_names_and_choices_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_choices(text)


def test_a_named_choice_that_the_device_lacks_is_refused_and_a_wildcard_is_not():
    x, gamma = torch.randn(2, 6), torch.ones(6)
    with (
        backends("rms_norm=npu"),
        pytest.raises(ValueError, match="rms_norm=npu is not available on cpu.*use one of aten, auto, ref"),
    ):
        rms_norm(x, gamma)
    with backends("*=npu"):
        assert torch.equal(rms_norm(x, gamma), rms_norm(x, gamma))
        assert backend_report("cpu")["rms_norm"].kernel == "aten"


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("rms_norm=lib", "rms_norm=lib is not available on cpu; use one of aten, auto, ref"),
        (
            "rms_norm=triton,*=ref",
            r"not available on cpu \(Triton runs on a CPU under TRITON_INTERPRET=1 only\); use one of aten",
        ),
    ],
)
def test_impossible_choices_are_refused_even_for_empty_input(choice, text):
    pytest.importorskip("triton")
    with backends(choice), pytest.raises(ValueError, match=text):
        rms_norm(torch.randn(0, 6), torch.ones(6))


def test_a_bad_environment_does_not_break_the_import_but_the_first_call(monkeypatch):
    monkeypatch.setenv("MINDSPEED_OPS", "rms_norm=fast")
    monkeypatch.setattr(REGISTRY, "choices", None)
    REGISTRY.forget_routes()
    with pytest.raises(ValueError, match="'rms_norm=fast' must be <operator>=<choice>"):
        rms_norm(torch.randn(2, 6), torch.ones(6))
    REGISTRY.forget_routes()


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True), ("true", True)])
def test_strict_mode(monkeypatch, value, expected):
    monkeypatch.setenv("MINDSPEED_OPS_STRICT", value)
    assert _registry.strict() is expected


def test_environment_variable_chooses(monkeypatch):
    monkeypatch.setenv("MINDSPEED_OPS", "rms_norm=ref")
    monkeypatch.setattr(REGISTRY, "choices", None)
    REGISTRY.forget_routes()
    rms_norm(torch.randn(2, 6), torch.ones(6))
    assert backend_report("cpu")["rms_norm"] == ("cpu", "ref", "plain torch")
    REGISTRY.forget_routes()


def test_opt_in_body_runs_when_named_and_steps_aside_aloud(extra_kernel, caplog):
    rms_norm(torch.randn(2, 6), torch.ones(6))
    assert extra_kernel == []
    with backends("rms_norm=lib"), caplog.at_level(logging.INFO, logger="mindspeed.ops._registry"):
        rms_norm(torch.randn(2, 6), torch.ones(6))
        assert extra_kernel == [(2, 6)]
        assert backend_report("cpu")["rms_norm"].kernel == "lib"
        for _ in range(2):
            rms_norm(torch.randn(2, 2), torch.ones(2))
    assert backend_report("cpu")["rms_norm"] == ("cpu", "ref", "the row is too short")
    assert [record.getMessage() for record in caplog.records] == [
        "mindspeed::rms_norm on cpu: the lib kernel steps aside: the row is too short"
    ]
    assert extra_kernel == [(2, 6)]


def test_device_bodies_never_see_empty_input(extra_kernel):
    with backends("rms_norm=lib"):
        rms_norm(torch.randn(0, 6), torch.ones(6))
    assert extra_kernel == []


def test_wrong_registration_is_refused():
    with pytest.raises(ValueError, match="backend 'cuda' must be one of aten, triton, npu, lib"):
        register_kernel("rms_norm", "cuda", devices=("cuda",))
    with pytest.raises(ValueError, match="is not in mindspeed.ops._registry.FAMILIES"):
        _registry.define("nothing(Tensor x) -> Tensor", family="nothing", reference=abs, fake=abs)


def test_not_differentiable_twice():
    x = torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, torch.ones(6)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="mindspeed::rms_norm_backward has no derivative"):
        grad.sum().backward()


IMPORT_CHECK = """
import gc, importlib, sys, time
import torch, torch.distributed
gc.disable()  # a collection over all of torch would be charged to whichever module is imported then
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"megatron", "torch_npu", "triton", "apex", "flash_attn", "transformer_engine"}:
            raise AssertionError("imports " + name)
sys.meta_path.insert(0, Refuse())
torch.cuda._lazy_init = torch.cuda.is_available = None
for name in ["mindspeed.ops", *sys.argv[1:]]:
    start = time.process_time()
    importlib.import_module(name)
    print(name, time.process_time() - start)
"""


def import_seconds():
    """CPU seconds of each import in a fresh interpreter that refuses everything but torch."""
    environment = {key: value for key, value in os.environ.items() if key != "MINDSPEED_OPS"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHECK, *all_modules()], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {name: float(seconds) for name, seconds in (line.split() for line in done.stdout.splitlines())}


def test_importing_any_operator_needs_torch_only_and_is_quick():
    slow = import_seconds()
    for _ in range(4):  # noise only adds: what was slow once must be slow in every interpreter
        slow = {name: seconds for name, seconds in slow.items() if seconds > 0.1}
        if not slow:
            return
        again = import_seconds()
        slow = {name: min(seconds, again[name]) for name, seconds in slow.items()}
    assert not {name: seconds for name, seconds in slow.items() if seconds > 0.1}
