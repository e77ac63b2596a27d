"""Which part of the tree may import which, and that methods live without a host."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "mindspeed"

# Part -> parts it may import when it is itself imported (inside functions and for types, hosts may be reached lazily).
MAY_IMPORT = {
    "ops": {"ops", "platform"},
    "core": {"core", "ops", "platform", "patching", "checkpoint", "data_files"},
    "patching": {"patching"},
    "platform": {"platform", "patching", "ops"},
    "checkpoint": {"checkpoint", "patching"},
    "data_files": {"data_files", "patching"},
    "host": {"host", "core", "ops", "platform", "patching", "checkpoint", "data_files", "runtime"},
}
EVERYBODY = {"errors", "notices"}
# The vocabulary of changes; the engine behind it is nobody's business in core.
VOCABULARY = {"mindspeed.patching", "mindspeed.patching.feature", "mindspeed.patching.flags", "mindspeed.patching.patch"}
SPEAKERS = {"megatron": ("host", "training", "testing"), "torch_npu": ("platform/npu.py", "ops/kernels/npu", "testing")}


def modules(part):
    path = ROOT / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports(path, everywhere=False):
    """(module, line) of the import statements of a file that run when it is imported, or of all."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else at_import(tree.body):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def at_import(body):
    """Statements that run at import: not inside functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for branch in ("body", "orelse", "handlers", "finalbody"):
            inner = getattr(node, branch, [])
            yield from at_import(inner if isinstance(inner, list) else [])


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_arrows_go_one_way(part):
    wrong = []
    for path in modules(part):
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] == "mindspeed" and len(parts) > 1 and parts[1] not in MAY_IMPORT[part] | EVERYBODY:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_methods_see_of_the_engine_only_its_vocabulary():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules("core")
        for module, line in imports(path, everywhere=True)
        if module.startswith("mindspeed.patching") and module not in VOCABULARY
    ]
    assert wrong == []


@pytest.mark.parametrize("package", SPEAKERS)
def test_host_and_vendor_packages_are_imported_in_their_places_only(package):
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith(SPEAKERS[package]):
            wrong += [f"{place}:{line}" for module, line in imports(path, True) if module.split(".")[0] == package]
    assert wrong == []


WITHOUT_HOST = """
import importlib, pkgutil, sys, time

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "torch_npu"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Absent())
begin = time.perf_counter()
import mindspeed
seconds = time.perf_counter() - begin
assert "torch" not in sys.modules, "importing mindspeed must not import torch"
assert seconds < 2, f"importing mindspeed takes {seconds:.1f} s"
argv = list(sys.argv)
count = 0
for package in ("mindspeed.core", "mindspeed.ops", "mindspeed.patching", "mindspeed.platform"):
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, package + "."):
        if not info.name.startswith("mindspeed.ops.kernels."):
            importlib.import_module(info.name)
            count += 1
assert sys.argv == argv and not any(name.partition(".")[0] in ("megatron", "torch_npu") for name in sys.modules)
import threading, torch
assert threading.active_count() == 1 and not torch.cuda.is_initialized() and mindspeed.patches() == ()
print(count)
"""


def test_everything_but_hosts_imports_without_megatron_and_vendor_packages():
    done = subprocess.run([sys.executable, "-c", WITHOUT_HOST], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
