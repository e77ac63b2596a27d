"""Rules of the kernel packages that no single test of a kernel can see."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed.ops import kernels
from mindspeed.ops._registry import FAMILIES

FILES = sorted(path for package in ("npu", "triton") for path in (Path(kernels.__path__[0]) / package).glob("[!_]*.py"))


def imported(path):
    tree = ast.parse(path.read_text())
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_kernel_file_belongs_to_one_family_and_imports_no_other(path):
    """Importing another family's file would register bodies for operators that may not be defined yet."""
    assert path.stem in FAMILIES
    others = {name for name in imported(path) if name.startswith("mindspeed.ops.kernels.")}
    assert {name for name in others if not name.rpartition(".")[2].startswith("_")} == set()


def test_operators_import_neither_torch_npu_nor_triton():
    code = """
import importlib, pkgutil, sys
import mindspeed.ops
for info in pkgutil.iter_modules(mindspeed.ops.__path__):
    if not info.ispkg:
        importlib.import_module(f"mindspeed.ops.{info.name}")
assert not {"torch_npu", "triton"} & set(sys.modules), "imported too early"
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
