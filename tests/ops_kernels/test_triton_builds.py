"""Every Triton kernel compiles to machine code for sm_80 and sm_90, on a machine without a GPU."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

import mindspeed.ops  # noqa: E402
import mindspeed.ops.kernels.triton as bodies  # noqa: E402


def with_kernels():
    """Names of the files that define kernels; shared kernels are built once, where they are defined."""
    files = sorted(Path(bodies.__path__[0]).glob("*.py"))
    return [file.stem for file in files if "\nBUILDS = " in file.read_text()]


def load(name):
    """Kernel files register with operators, so those must be defined first."""
    for info in pkgutil.iter_modules(mindspeed.ops.__path__):
        if not info.ispkg:
            importlib.import_module(f"mindspeed.ops.{info.name}")
    return importlib.import_module(f"mindspeed.ops.kernels.triton.{name}")


def flipped(constants):
    """UPCAST stays: it is for the interpreter, and widened products take half a minute to compile."""
    return {name: not value if isinstance(value, bool) and name != "UPCAST" else value for name, value in constants.items()}


def in_dtype(builds, dtype):
    """The builds with pointers to another floating type where they have bfloat16."""
    return tuple(replace(build, types=build.types.replace("*bf16", f"*{dtype}")) for build in builds if "*bf16" in build.types)


def variants(name, capability):
    """All kernels of a file in all dtypes: bfloat16 on both devices, float16 with every switch the other way, float32."""
    builds = load(name).BUILDS
    if capability == 90:
        turned = tuple(replace(build, constants=flipped(build.constants)) for build in builds)
        return builds + in_dtype(turned, "fp16") + tuple(build for build in turned if "*bf16" not in build.types)
    # float32 products need tiles of another size, which have builds of their own
    return builds if "grouped" in name else builds + in_dtype(builds, "fp32")


def compiled(build, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in build.kernel.arg_names if name not in build.constants]
    types = build.types.split()
    assert len(names) == len(types), f"{build.kernel.__name__}: arguments {names}, types {types}"
    signature = dict(zip(names, types, strict=True))
    if "constexprs" in inspect.signature(ASTSource).parameters:
        signature |= dict.fromkeys(build.constants, "constexpr")
        source = ASTSource(build.kernel, {name: signature[name] for name in build.kernel.arg_names}, constexprs=build.constants)
    else:  # Triton 3.2
        source = ASTSource(build.kernel, signature, constants=build.constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", with_kernels())
def test_kernels_compile(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns that 3.10 changes the default
    for build in variants(name, capability):
        binary = compiled(build, capability)
        assert f"sm_{capability}" in binary.asm["ptx"]
        assert binary.asm["cubin"].startswith(b"\x7fELF")


def test_every_kernel_is_built():
    """A kernel without a row in BUILDS would escape the test above."""
    modules = [load(info.name) for info in pkgutil.iter_modules(bodies.__path__)]
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)}
    called = {name for kernel in kernels for name in kernel.fn.__code__.co_names}
    entries = {kernel for kernel in kernels if kernel.__name__ not in called}
    assert entries == {build.kernel for module in modules for build in getattr(module, "BUILDS", ())}
