"""Builds what the NPU contract tests need: the torch_npu wheel, unpacked, and stub CANN libraries to load it with.

    python tools/npu_contract/build.py            # download, unpack, compile; a second call does nothing
    python tools/npu_contract/build.py --force    # again from the wheel

The stubs make torch_npu believe in one Ascend 910B1 whose memory is host memory and whose kernels succeed without computing.
Nothing here needs an NPU or CANN; gcc, nm (binutils) and a matching torch are enough. Outputs go to `.npu_contract/` beside
this repository's sources, which git ignores: they are build products of the machine they were made on and never committed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

TORCH_NPU_VERSION = "2.13.0"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / ".npu_contract"
DEVICE_LIBRARY = "libascendcl.so"
KERNEL_LIBRARY = "libopapi.so"
ATB_LIBRARY = "libatb.so"

# Names that torch_npu looks up by dlsym and whose mere presence sends it down paths that the emulated device does not have.
ABSENT = re.compile(
    r"aclmdlRI|aclprof|aclshmem|aclsk|aclrtIpc|aclrtMemcpyBatch|aclrtMemUce|aclrtGetMemUce|aclrtRepair|aclStress|aclrtGetDeviceInfo"
    r"|aclGetCannAttribute|aclsysGetCANNVersion|aclrtGetMemUsageInfo|aclrtGetResIn|aclrtGetDeviceResLimit|aclrtGetLogicDevId"
    r"|HcclGroup|HcclCommSymWin|HcclComm(Exchange|Activate|Deactivate|SetMemory|Unset|Working)"
)
RUNTIME_NAME = re.compile(r"acl(?!nn)[A-Za-z0-9]{3,}|rt[A-Z][A-Za-z0-9]+|Hccl[A-Z][A-Za-z0-9]+")
KERNEL_NAME = re.compile(r"aclnn[A-Z][A-Za-z0-9]*|acl(Rfft1D|Stft)(GetWorkspaceSize)?")
COLLECTIVE = re.compile(
    r"Hccl(AllReduce|AllGather|AllGatherV|ReduceScatter|ReduceScatterV|Broadcast|Reduce|Scatter|AlltoAllV?C?|Send|Recv|BatchSendRecv)"
)
DEFINITION = re.compile(r"^(?:int|void \*|const char \*|size_t |void |ZERO\()\s*\*?((?:acl|Hccl)\w+)", re.MULTILINE)


class BuildError(RuntimeError):
    """The contract environment cannot be built here; the message says what is missing and how to get it."""


def obstacle() -> str | None:
    """Why this machine cannot run the contract tests at all, or None when it can."""
    import torch

    if sys.platform != "linux":
        return f"the torch_npu wheel is for Linux, this is {sys.platform}"
    have = torch.__version__.split("+")[0]
    if have.split(".")[:2] != TORCH_NPU_VERSION.split(".")[:2]:
        return f"torch_npu {TORCH_NPU_VERSION} needs torch {TORCH_NPU_VERSION}, installed is torch {have}"
    for tool, package in (("gcc", "gcc"), ("nm", "binutils"), ("readelf", "binutils")):
        if shutil.which(tool) is None:
            return f"{tool} is not on PATH (install the package {package})"
    return None


def home() -> Path:
    """Where this build belongs: one folder per wheel, interpreter and state of the sources."""
    digest = hashlib.sha256()
    for source in sorted([*HERE.glob("*.c"), Path(__file__)]):
        digest.update(source.read_bytes())
    interpreter = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    return ROOT / f"torch_npu-{TORCH_NPU_VERSION}-{interpreter}-{digest.hexdigest()[:12]}"


def built() -> Path | None:
    """The finished build for these sources and this interpreter, or None."""
    return home() if (home() / "build.json").is_file() else None


def build(force: bool = False) -> Path:
    """Make the build unless it is there; safe to call from several processes. Returns its folder."""
    if reason := obstacle():
        raise BuildError(f"NPU contract: {reason}")
    ROOT.mkdir(exist_ok=True)
    with (ROOT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (done := built()) and not force:
            return done
        with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
            made = Path(scratch) / "build"
            made.mkdir()
            _unpack(_wheel(), made / "site")
            _compile_stubs(made)
            shutil.rmtree(home(), ignore_errors=True)
            os.replace(made, home())
    return home()


def stub_libraries(folder: Path) -> list[Path]:
    """The libraries to load globally, in this order, before torch_npu; glibc then finds them by SONAME."""
    names = json.loads((folder / "build.json").read_text())["libraries"]
    return [folder / "stubs" / name for name in names]


# ---- the wheel ------------------------------------------------------------------------------------------------------


def _wheel() -> Path:
    wheels = ROOT / "wheel"
    pattern = f"torch_npu-{TORCH_NPU_VERSION}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    if not any(wheels.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            str(wheels),
            f"torch_npu=={TORCH_NPU_VERSION}",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise BuildError(
                f"NPU contract: `pip download torch_npu=={TORCH_NPU_VERSION}` failed; put the wheel into {wheels} by hand.\n"
                f"{result.stdout[-500:]}{result.stderr[-1500:]}"
            )
    return next(wheels.glob(pattern))


def _unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


# ---- symbols ----------------------------------------------------------------------------------------------------------


def _symbols(library: Path, which: str) -> set[str]:
    listing = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listing.splitlines())
    return {row[-1].split("@")[0] for row in rows if len(row) >= 2 and not (which == "--undefined-only" and row[-2] != "U")}


def _needed(library: Path) -> set[str]:
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", listing))


def _strings(library: Path) -> set[str]:
    """Printable text between zero bytes: the names that the library hands to dlsym."""
    return {run.decode() for run in re.findall(rb"[\x20-\x7e]{4,}", library.read_bytes())}


def _system_library(name: str) -> Path | None:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return Path(found) if os.path.isabs(found) else None


def _missing(libraries: list[Path]) -> tuple[list[str], set[str]]:
    """What CANN would provide: (names of absent libraries, strong symbols that nobody defines)."""
    import torch

    torch_lib = Path(torch.__file__).parent / "lib"
    own = {library.name for library in libraries}
    defined: set[str] = set()
    absent: list[str] = []
    for name in sorted(set().union(*map(_needed, libraries))):
        if name in own:
            continue
        path = torch_lib / name if (torch_lib / name).exists() else _system_library(name)
        if path is None:
            absent.append(name)
        else:
            defined |= _symbols(path, "--defined-only")
    # libtorch.so and its like are empty shells: the symbols live in what they need.
    for path in (torch_lib / name for name in ("libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libshm.so")):
        defined |= _symbols(path, "--defined-only")
    for library in libraries:
        defined |= _symbols(library, "--defined-only")
    undefined = set().union(*(_symbols(library, "--undefined-only") for library in libraries)) - defined
    return absent, {name for name in undefined if not name.startswith("Py") and not name.startswith("_Py")}


# ---- the stubs ----------------------------------------------------------------------------------------------------------


def _compile_stubs(made: Path) -> None:
    package = made / "site" / "torch_npu"
    main = package / "lib" / "libtorch_npu.so"
    core = [main, package / "lib" / "libtensorpipe.so", package / "lib" / "libnpu_profiler.so", *package.glob("_C*.so")]
    absent, undefined = _missing(core)
    _, atb_undefined = _missing([*core, package / "lib" / "libop_plugin_atb.so"])
    names = {name for text in map(_strings, core) for name in text}
    runtime = {name for name in names if RUNTIME_NAME.fullmatch(name) and not ABSENT.match(name)} | undefined
    kernels = {name for name in names if KERNEL_NAME.fullmatch(name)}
    atb = {name for name in atb_undefined - undefined if name.startswith("_ZN3atb")}

    stubs = made / "stubs"
    stubs.mkdir()
    _compile(stubs / DEVICE_LIBRARY, _with_names(HERE / "emulated_device.c", _runtime_lines(runtime - kernels)))
    _compile(stubs / KERNEL_LIBRARY, _with_names(HERE / "emulated_kernels.c", _kernel_lines(kernels)), needs=[DEVICE_LIBRARY])
    _compile(stubs / ATB_LIBRARY, "\n".join(f"long {name}(void) {{ return 0; }}" for name in sorted(atb)))
    others = [name for name in absent if name != DEVICE_LIBRARY]
    for name in others:
        _compile(stubs / name, "", needs=[DEVICE_LIBRARY])
    facts = {
        "torch_npu": TORCH_NPU_VERSION,
        "libraries": [DEVICE_LIBRARY, KERNEL_LIBRARY, ATB_LIBRARY, *others],
        "undefined": sorted(undefined),
        "undefined_atb": sorted(atb),
        "runtime_names": len(runtime),
        "kernels": sorted(kernels),
    }
    (made / "build.json").write_text(json.dumps(facts, indent=1))


def _with_names(source: Path, lines: Iterable[str]) -> str:
    text = source.read_text()
    written = set(DEFINITION.findall(text))
    return "\n".join([text, *(line for name, line in lines if name not in written)]) + "\n"


def _runtime_lines(names: set[str]) -> Iterator[tuple[str, str]]:
    for name in sorted(names):
        body = f'contract_call("{name}"); return 0;' if COLLECTIVE.fullmatch(name) else "return 0;"
        yield name, f"long {name}(void) {{ {body} }}"


def _kernel_lines(names: set[str]) -> Iterator[tuple[str, str]]:
    for name in sorted(names):
        yield name, f"{'ZERO' if name.endswith('GetWorkspaceSize') else 'KERNEL'}({name})"


def _compile(library: Path, source: str, needs: Iterable[str] = ()) -> None:
    code = library.with_suffix(".c")
    code.write_text(source)
    command = ["gcc", "-O0", "-g0", "-w", "-fno-builtin", "-fPIC", "-shared", f"-Wl,-soname,{library.name}"]
    command += ["-o", str(library), str(code), f"-L{library.parent}", "-Wl,--no-as-needed", *(f"-l:{name}" for name in needs)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"NPU contract: gcc cannot compile {code.name}:\n{result.stderr[-3000:]}")


def main() -> None:
    """Command line: build and say what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="build again even if a build for these sources exists")
    folder = build(force=parser.parse_args().force)
    facts = json.loads((folder / "build.json").read_text())
    print(
        f"{folder}: {len(facts['undefined'])} undefined symbols, {facts['runtime_names']} runtime names, {len(facts['kernels'])} kernels"
    )


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(str(error))
