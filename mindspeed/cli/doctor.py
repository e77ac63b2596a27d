"""`mindspeed doctor`: what is installed, which device is used, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as machine
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindspeed import __version__
from mindspeed.errors import MindspeedError

SUPPORTED_CORE = "0.12.1"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `state` is ok, note (works without) or bad (training cannot start)."""

    topic: str
    state: str
    found: str
    advice: str = ""


def run(console: Console | None = None) -> int:
    """Print the report; 0 when training can start here, 1 otherwise."""
    console = console or Console()
    findings = [finding for check in CHECKS for finding in check()]
    table = Table(title=f"mindspeed {__version__}", title_justify="left")
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark, style = {"ok": ("ok", "green"), "note": ("note", "yellow"), "bad": ("missing", "bold red")}[finding.state]
        table.add_row(Text(mark, style=style), finding.topic, Text(finding.found), Text(finding.advice))
    console.print(table)
    ready = all(finding.state != "bad" for finding in findings)
    if ready:
        console.print("Ready. Try: [bold]mindspeed quickstart[/bold]")
    else:
        console.print("[red]Not ready:[/red] mend the lines marked missing.")
    return 0 if ready else 1


def version_of(distribution: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Finding]:
    """Interpreter and machine."""
    yield Finding(
        "Python", "ok", f"{machine.python_version()} on {machine.system()} {machine.machine()}, {os.cpu_count()} cores"
    )


def check_torch() -> Iterator[Finding]:
    """Torch and its collective backends."""
    import torch
    import torch.distributed as dist

    yield Finding("torch", "ok", torch.__version__)
    backends = [name for name in ("gloo", "nccl", "mpi") if dist.is_available() and getattr(dist, f"is_{name}_available")()]
    if "gloo" in backends or "nccl" in backends:
        yield Finding("collectives", "ok", ", ".join(backends))
    else:
        yield Finding("collectives", "bad", "none", "install a torch build with torch.distributed")


def check_platform() -> Iterator[Finding]:
    """The device that training would use."""
    from mindspeed.platform import current

    wanted = os.environ.get("MINDSPEED_PLATFORM", "auto")
    try:
        platform = current()
    except MindspeedError as error:
        yield Finding("platform", "bad", f"MINDSPEED_PLATFORM={wanted}", str(error))
        return
    yield Finding("platform", "ok", f"{platform.name}, collectives over {platform.backend} (MINDSPEED_PLATFORM={wanted})")


def check_megatron() -> Iterator[Finding]:
    """The host library and, if there is one, a Megatron-LM checkout."""
    version = version_of("megatron-core")
    if version == SUPPORTED_CORE:
        yield Finding("megatron-core", "ok", version)
    elif version is None:
        yield Finding("megatron-core", "bad", "not installed", f"pip install megatron-core=={SUPPORTED_CORE}")
    else:
        yield Finding("megatron-core", "note", version, f"tested with {SUPPORTED_CORE}; changed targets are reported at start")
    try:
        has_training = importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        has_training = False
    if has_training:
        yield Finding("Megatron-LM", "ok", "megatron.training can be imported")
    else:
        yield Finding("Megatron-LM", "note", "no checkout on PYTHONPATH", "not needed for mindspeed pretrain")


def check_extras() -> Iterator[Finding]:
    """Packages that single abilities need."""
    for distribution, purpose in {
        "tensorboard": "curves in TensorBoard",
        "tokenizers": "tokenizer files",
        "matplotlib": "the loss curve as a picture",
        "pyarrow": "Parquet input",
        "triton": "fused kernels on NVIDIA GPUs",
        "torch_npu": "Ascend NPUs",
        "transformer_engine": "the host's Transformer Engine layers",
    }.items():
        version = version_of(distribution)
        extra = "mindspeed[cuda]" if distribution == "triton" else "mindspeed[train]"
        source = distribution if distribution in ("torch_npu", "transformer_engine") else extra
        if version:
            yield Finding(distribution, "ok", version)
        else:
            yield Finding(distribution, "note", "not installed", f"for {purpose}: pip install '{source}'")


def check_helpers() -> Iterator[Finding]:
    """The host's compiled index builder; without it numpy does the same, slower."""
    try:
        found = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    except ModuleNotFoundError:
        return
    if found:
        yield Finding("data helpers", "ok", "compiled")
    else:
        compiler = shutil.which("g++") or "no g++"
        yield Finding(
            "data helpers", "note", f"not compiled ({compiler})", "built once per user if possible, else numpy is used"
        )


def check_machine() -> Iterator[Finding]:
    """Memory, shared memory and disk."""
    import psutil

    gigabyte = 1 << 30
    memory = psutil.virtual_memory()
    yield Finding("memory", "ok", f"{memory.available / gigabyte:.1f} of {memory.total / gigabyte:.1f} GiB available")
    free = shutil.disk_usage(Path.cwd()).free / gigabyte
    enough = free >= 2
    yield Finding("disk", "ok" if enough else "note", f"{free:.1f} GiB free here", "" if enough else "checkpoints may not fit")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_platform,
    check_megatron,
    check_helpers,
    check_extras,
    check_machine,
)
