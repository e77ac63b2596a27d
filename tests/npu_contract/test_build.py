"""The build of the contract environment: what it needs, what it says when that is missing, what it makes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mindspeed.testing import npu_contract
from mindspeed.testing.npu_contract import builder, unavailable


@pytest.fixture
def tool():
    return builder()


@pytest.mark.parametrize("missing", ["gcc", "nm", "readelf"])
def test_a_missing_compiler_is_named(tool, monkeypatch, missing):
    monkeypatch.setattr(torch, "__version__", tool.TORCH_NPU_VERSION)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    assert f"{missing} is not on PATH" in tool.obstacle()
    with pytest.raises(tool.BuildError, match=f"{missing} is not on PATH"):
        tool.build()


def test_another_torch_is_named(tool, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    assert (
        tool.obstacle() == f"torch_npu {tool.TORCH_NPU_VERSION} needs torch {tool.TORCH_NPU_VERSION}, installed is torch 2.7.1"
    )


def test_tests_are_skipped_without_the_wheel_but_ci_builds(tool, monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "obstacle", lambda: None)
    monkeypatch.setattr(tool, "build", lambda: built.append(True))
    monkeypatch.delenv("CI", raising=False)
    assert "run `python tools/npu_contract/build.py` once" in unavailable.__wrapped__()
    assert built == []
    monkeypatch.setenv("CI", "true")
    assert unavailable.__wrapped__() is None and built == [True]


def test_an_installed_package_without_the_tool_says_so(monkeypatch):
    monkeypatch.setattr(npu_contract, "builder", lambda: None)
    assert "run the tests from a checkout" in unavailable.__wrapped__()


def test_a_failing_download_names_the_folder_to_fill(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "TORCH_NPU_VERSION", "0.0.1")
    with pytest.raises(tool.BuildError, match=rf"put the wheel into {tmp_path}/wheel by hand"):
        tool._wheel()


@pytest.mark.npu_contract
def test_what_is_built(tool):
    if reason := unavailable():
        pytest.skip(reason)
    facts = json.loads((tool.built() / "build.json").read_text())
    assert tool.build() == tool.built(), "a second call makes nothing"
    assert len(facts["undefined"]) == 84 and len(facts["undefined_atb"]) == 12
    assert {"aclnnRmsNorm", "aclnnRmsNormGetWorkspaceSize"} <= set(facts["kernels"])
    assert [path.name for path in tool.stub_libraries(tool.built())][0] == "libascendcl.so"
    assert all(path.is_file() for path in tool.stub_libraries(tool.built()))
