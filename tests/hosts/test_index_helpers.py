import importlib.util
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from megatron.core.datasets import helpers_cpp

from mindspeed.host import index_builder, index_helpers


@pytest.mark.parametrize("seed", range(60))
def test_sample_index_equals_the_compiled_one(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0 if seed % 2 else 1, 40, rng.integers(1, 30)).astype(np.int32)
    sizes[rng.integers(len(sizes))] = 60
    epochs, seq, extra = int(rng.integers(1, 4)), int(rng.integers(2, 50)), int(rng.integers(0, 2))
    documents = np.concatenate([rng.permutation(len(sizes)) for _ in range(epochs)]).astype(np.int32)
    arguments = (sizes, documents, seq, epochs, int(sizes.sum()), True, extra)
    for name in ("build_sample_idx_int32", "build_sample_idx_int64"):
        ours, theirs = getattr(index_helpers, name)(*arguments), getattr(helpers_cpp, name)(*arguments)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(20))
def test_last_partial_sample_ends_with_the_last_document(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, rng.integers(2, 12)).astype(np.int32)
    documents = rng.permutation(len(sizes)).astype(np.int32)
    arguments = (sizes, documents, 7, 1, int(sizes.sum()), False, 1)
    np.testing.assert_array_equal(
        index_helpers.build_sample_idx_int32(*arguments), helpers_cpp.build_sample_idx_int32(*arguments)
    )


@pytest.mark.parametrize("seed", range(20))
def test_blends_equal_the_compiled_ones(seed):
    rng = np.random.default_rng(seed)
    count, size = int(rng.integers(1, 6)), int(rng.integers(1, 200))
    weights = rng.random(count) + 0.01
    weights /= weights.sum()
    sizes = rng.integers(1, 40, count).astype(np.int64)

    def filled(module):
        blend = np.zeros(size, np.int16), np.zeros(size, np.int64)
        module.build_blending_indices(*blend, weights, count, size, False)
        exhaustive = np.zeros(sizes.sum(), np.int16), np.zeros(sizes.sum(), np.int64)
        module.build_exhaustive_blending_indices(*exhaustive, sizes, count)
        return [*blend, *exhaustive]

    for ours, theirs in zip(filled(index_helpers), filled(helpers_cpp), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_sentence_mappings_say_what_is_missing():
    with pytest.raises(RuntimeError, match="install a C\\+\\+ compiler"):
        index_helpers.build_mapping()


def test_numpy_module_has_all_names_of_the_compiled_one(monkeypatch, caplog):
    monkeypatch.setattr(index_builder, "installed_copy", lambda: None)
    monkeypatch.setattr(index_builder, "compiled_copy", lambda: None)
    with caplog.at_level(logging.INFO):
        spec = index_builder.IndexHelpersFinder().find_spec(index_builder.MODULE, None)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {name for name in dir(helpers_cpp) if name.startswith("build_")} <= set(dir(module))
    assert "built with numpy" in caplog.text


def test_finder_leaves_other_modules_alone_and_is_installed_once():
    assert index_builder.IndexHelpersFinder().find_spec("json", None) is None
    try:
        index_builder.install()
        index_builder.install()
        assert sum(isinstance(finder, index_builder.IndexHelpersFinder) for finder in sys.meta_path) == 1
    finally:
        index_builder.uninstall()
    assert not any(isinstance(finder, index_builder.IndexHelpersFinder) for finder in sys.meta_path)


@pytest.fixture
def core_with_source(tmp_path, monkeypatch):
    datasets = tmp_path / "megatron" / "core" / "datasets"
    datasets.mkdir(parents=True)
    (datasets / "helpers.cpp").write_text("source")
    monkeypatch.setattr(index_builder, "find_package", lambda name: datasets.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def fake_compiler(directory, body):
    compiler = directory / "c++"
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o755)
    return {"CXX": str(compiler), "PATH": f"{directory}{os.pathsep}/usr/bin{os.pathsep}/bin"}


def test_source_is_compiled_once_into_the_user_s_cache(core_with_source, monkeypatch):
    calls = core_with_source / "calls"
    script = f'echo x >> {calls}\nwhile [ "$1" != "-o" ]; do shift; done\necho binary > "$2"'
    for name, value in fake_compiler(core_with_source, script).items():
        monkeypatch.setenv(name, value)
    first, second = index_builder.compiled_copy(), index_builder.compiled_copy()
    assert first == second and first.read_text() == "binary\n"
    assert first.parent == core_with_source / "cache" / "mindspeed"
    assert calls.read_text().count("x") == 1
    assert not [path for path in first.parent.iterdir() if path.is_dir()]


def test_failing_compiler_means_numpy_and_one_warning(core_with_source, monkeypatch, caplog):
    for name, value in fake_compiler(core_with_source, "exit 1").items():
        monkeypatch.setenv(name, value)
    assert index_builder.compiled_copy() is None
    assert "cannot compile" in caplog.text


def test_read_only_home_means_numpy(core_with_source, monkeypatch):
    for name, value in fake_compiler(core_with_source, "exit 0").items():
        monkeypatch.setenv(name, value)
    (core_with_source / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(core_with_source / "file"))
    assert index_builder.compiled_copy() is None


def test_lock_of_a_dead_process_does_not_block(tmp_path):
    path = tmp_path / "x.lock"
    program = f"import pathlib, os; from mindspeed.host.index_builder import lock\nwith lock(pathlib.Path({str(path)!r}), 1): os._exit(0)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with index_builder.lock(path, seconds=0.1), pytest.raises(OSError):
        with index_builder.lock(path, seconds=0.1):
            raise AssertionError("two holders")
