"""Find, compile or stand in for `megatron.core.datasets.helpers_cpp`, the host's compiled index functions.

PyPI wheels carry it compiled; a Megatron-LM checkout compiles it into itself with `make` at start and ends
the job when that fails. Here the first import of the missing module decides, on every rank alike: the copy of
an installed megatron-core of the same version, else one compiled into the user's cache, else numpy.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from mindspeed.host.identity import core_version, find_package

logger = logging.getLogger(__name__)

MODULE = "megatron.core.datasets.helpers_cpp"
COMPILE_SECONDS = 120
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"


class IndexHelpersFinder(importlib.abc.MetaPathFinder):
    """Last finder of `sys.meta_path`: asked only when the host's directory has no compiled module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Spec of an installed or compiled copy, or of the numpy functions."""
        if name != MODULE:
            return None
        compiled = installed_copy() or compiled_copy()
        if compiled is not None:
            loader = importlib.machinery.ExtensionFileLoader(name, str(compiled))
            return importlib.util.spec_from_file_location(name, compiled, loader=loader)
        logger.info("no C++ compiler for %s: sample indices are built with numpy", MODULE)
        return ModuleSpec(name, NumpyLoader())


class NumpyLoader(importlib.abc.Loader):
    """Fills the module with the functions of `mindspeed.host.index_helpers`."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Use the default module object."""

    def exec_module(self, module: ModuleType) -> None:
        """Copy the public functions."""
        from mindspeed.host import index_helpers

        for name, value in vars(index_helpers).items():
            if name.startswith("build_"):
                setattr(module, name, value)


def install() -> None:
    """Offer the finder to the import system, once."""
    if not any(isinstance(finder, IndexHelpersFinder) for finder in sys.meta_path):
        sys.meta_path.append(IndexHelpersFinder())


def uninstall() -> None:
    """Take the finder away again."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, IndexHelpersFinder)]


def installed_copy() -> Path | None:
    """The compiled module of another megatron-core of the same version on `sys.path`."""
    own = find_package("megatron.core")
    if own is None:
        return None
    for entry in sys.path:
        core = Path(entry or ".") / "megatron" / "core"
        candidate = core / "datasets" / f"helpers_cpp{_SUFFIX}"
        if candidate.is_file() and core_version(core) == core_version(own):
            return candidate
    return None


def compiled_copy() -> Path | None:
    """The module compiled into the user's cache, compiled now if need be; None without a compiler."""
    core = find_package("megatron.core")
    source = None if core is None else core / "datasets" / "helpers.cpp"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if source is None or not source.is_file() or compiler is None:
        return None
    digest = hashlib.sha256(source.read_bytes() + _SUFFIX.encode()).hexdigest()[:16]
    try:
        directory = cache_directory()
        binary = directory / f"helpers_cpp-{digest}{_SUFFIX}"
        with lock(binary.with_suffix(".lock"), seconds=COMPILE_SECONDS):
            if not binary.is_file():
                compile_to(binary, source, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("cannot compile %s (%s)", source, error)
        return None
    return binary


def cache_directory() -> Path:
    """`mindspeed` below the user's cache directory, created when absent."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(base) / "mindspeed"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def compile_to(binary: Path, source: Path, compiler: str) -> None:
    """Compile under a temporary name and rename, so that nobody sees half a file."""
    import torch

    headers = [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"])]
    with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
        output = Path(scratch) / binary.name
        command = [compiler, "-O3", "-shared", "-std=c++17", "-fPIC", *(f"-I{path}" for path in headers)]
        subprocess.run([*command, str(source), "-o", str(output)], check=True, capture_output=True, timeout=COMPILE_SECONDS)
        output.replace(binary)


@contextlib.contextmanager
def lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold an advisory lock that the system drops when its holder dies.

    Raises:
        OSError: it could not be had in time.
    """
    import fcntl

    deadline = time.monotonic() + seconds
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
