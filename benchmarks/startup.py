"""Start-up: what our import line adds to a host's start, and how long people wait for an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks._case import Check, Paired, Run, Skip, case

ROOT = Path(__file__).parent.parent
FINE = Check(0.0, 0.0, "the process ended with status 0")

HOST_IMPORTS = (
    "import megatron.core.models.gpt, megatron.core.models.gpt.gpt_layer_specs, megatron.core.distributed, "
    "megatron.core.optimizer, megatron.core.pipeline_parallel, megatron.core.datasets.gpt_dataset"
)


def cpu_seconds_of(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> float:
    """User and system time of a process and its children.

    Raises:
        RuntimeError: it failed; the text holds the end of its output.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{output[-2000:]}")
    return usage.ru_utime + usage.ru_stime


class Added:
    """What `ours` costs more than `base`: difference of the least costs seen so far, since noise only adds."""

    def __init__(self, ours: Sequence[str], base: Sequence[str]) -> None:
        self._commands = {"ours": ours, "base": base}
        self._least = {"ours": float("inf"), "base": float("inf")}

    def __call__(self) -> dict[str, float]:
        for name, command in self._commands.items():
            self._least[name] = min(self._least[name], cpu_seconds_of(command))
        return {"ours": self._least["ours"] - self._least["base"], "host alone": self._least["base"]}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@case(
    "startup.import",
    feature="megatron_adaptor",
    metric="value",
    better="lower",
    must=0.5,
    aim=0.3,
    unit="CPU s",
    preset="smoke",
)
def adaptor_import(run: Run) -> Paired:
    """CPU seconds that `import mindspeed.megatron_adaptor` adds to the host's own imports."""
    line = f"import mindspeed.megatron_adaptor; {HOST_IMPORTS}"
    return Paired(round=Added(python(line), python(HOST_IMPORTS)), check=FINE, statistic="last")


@case("startup.platform", feature="platform", metric="value", better="lower", must=0.2, unit="CPU s")
def package_import(run: Run) -> Paired:
    """CPU seconds that `import mindspeed, mindspeed.platform` adds to `import torch`."""
    ours = python("import torch, mindspeed, mindspeed.platform")
    return Paired(round=Added(ours, python("import torch")), check=FINE, statistic="last")


@case("startup.explain", feature="explain", metric="value", better="lower", must=3.0, aim=2.0, unit="CPU s", preset="smoke")
def explain(run: Run) -> Paired:
    """CPU seconds of `mindspeed explain` for a command line with a few features."""
    flags = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1 --noop-layers 0,7"
    command = [sys.executable, "-m", "mindspeed", "explain", "--", *flags.split()]
    cpu_seconds_of(command)
    return Paired(round=lambda: {"ours": cpu_seconds_of(command)}, check=FINE, statistic="min", workload={"flags": flags})


@case("startup.apply", feature="patching", metric="value", better="lower", must=0.2, unit="CPU s", preset="smoke")
def apply_all(run: Run) -> Paired:
    """CPU seconds to lay the ground (platform, repairs) and plan and apply one feature, host imported already."""
    code = (
        f"import time; {HOST_IMPORTS}\n"
        "import mindspeed\nfrom mindspeed.patching.discovery import all_features\nall_features()\n"
        "before = time.process_time()\n"
        "mindspeed.enable(num_layers=8, noop_layers='0,7')\n"
        "print('seconds', time.process_time() - before)"
    )

    return Paired(round=lambda: {"ours": _printed(code, "seconds")}, check=FINE, statistic="min")


@case("startup.processes", feature="megatron_adaptor", metric="value", better="equal", must=0, unit="processes", preset="smoke")
def no_processes(run: Run) -> Paired:
    """Processes started, or sockets connected, by the import line: none is allowed."""
    code = (
        "import sys; seen = []\n"
        "def watch(event, args):\n"
        "    if event in ('subprocess.Popen', 'os.system', 'os.fork', 'os.posix_spawn', 'socket.connect'):\n"
        "        seen.append((event, args))\n"
        "import torch\nsys.addaudithook(watch)\nimport mindspeed.megatron_adaptor\n"
        "print(seen, file=sys.stderr)\nprint('count', len(seen))"
    )

    if sys.platform == "win32":
        raise Skip("audit events differ on Windows")
    return Paired(round=lambda: {"ours": _printed(code, "count")}, check=FINE, statistic="min")


@case("startup.first_step", feature="trainer", metric="value", better="lower", must=1.0, unit="CPU s")
def first_step(run: Run) -> Paired:
    """CPU seconds that the first training step of a process costs more than the later ones, fused operators on."""
    flags = "--use-flash-attn --normalization RMSNorm --use-fused-rmsnorm --swiglu --use-fused-swiglu"
    code = f"from benchmarks.step import train_with; print('seconds', train_with({flags!r}, 32).only_once)"
    return Paired(round=lambda: {"ours": _printed(code, "seconds")}, check=FINE, statistic="min", workload={"flags": flags})


def _printed(code: str, label: str) -> float:
    """The number that a fresh interpreter prints behind `label`."""
    ended = subprocess.run(python(code), cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr[-2000:])
    return float(ended.stdout.split(f"{label} ")[-1])
