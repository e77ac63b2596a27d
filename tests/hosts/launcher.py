"""Runs of Megatron-LM's own scripts, with our import line added to a copy, for tests and the matrix."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

IMPORT_LINE = "import mindspeed.megatron_adaptor\n"
_LINE = re.compile(r" iteration +(\d+)/.*")
_LOSS = re.compile(r"\| lm loss: (\S+) \|")
_NORM = re.compile(r"\| grad norm: (\S+) \|")
_SKIPPED = re.compile(r" iteration +(\d+)/.*number of skipped iterations: +(\d+)")


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    codes: list[int]
    seconds: float
    logs: list[str] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether every rank ended with status 0."""
        return not any(self.codes)

    @property
    def log(self) -> str:
        """Output of all ranks."""
        return "\n".join(self.logs)

    @property
    def curve(self) -> dict[int, tuple[str, str]]:
        """Iteration -> (loss, gradient norm), as printed; steps that were skipped print no loss."""
        curve = {}
        for line in _LINE.finditer(self.log):
            loss, norm = _LOSS.search(line.group()), _NORM.search(line.group())
            if loss and norm:
                curve[int(line.group(1))] = (loss.group(1), norm.group(1))
        return curve

    @property
    def skipped(self) -> int:
        """Iterations that an overflow made the optimizer skip."""
        return sum(int(match.group(2)) for match in _SKIPPED.finditer(self.log))

    def tail(self, characters: int = 3000) -> str:
        """End of each rank's output."""
        return "\n".join(
            f"--- rank {rank}, status {self.codes[rank]}\n{log[-characters:]}" for rank, log in enumerate(self.logs)
        )


class MegatronRuns:
    """Launches runs from one zygote; use as a context manager."""

    def __init__(self, checkout: Path, directory: Path, *, adaptor: bool = True) -> None:
        self.checkout = checkout
        self.directory = directory
        self.script = directory / "pretrain_gpt.py"
        text = (checkout / "pretrain_gpt.py").read_text()
        self.script.write_text((IMPORT_LINE if adaptor else "") + text)
        self._count = 0
        self._imports = "adaptor" if adaptor else "host"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> MegatronRuns:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.communicate(timeout=20)

    def environment(self) -> dict[str, str]:
        """Variables of every process of a run."""
        paths = [str(self.checkout), str(Path(__file__).parents[2])]
        return {
            **os.environ,
            "MEGATRON_LM_PATH": str(self.checkout),
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "MINDSPEED_PLATFORM": "cpu",
            "ZYGOTE_IMPORTS": self._imports,
            "PYTHONWARNINGS": "ignore",
        }

    def __call__(
        self,
        *argv: str,
        world: int = 1,
        env: Mapping[str, str] | None = None,
        script: Path | None = None,
        seconds: float = 180,
    ) -> Run:
        """Run a script on `world` ranks and wait for it."""
        self._count += 1
        log = self.directory / f"run{self._count:03d}.log"
        request = {
            "script": str(script or self.script),
            "argv": list(argv),
            "world": world,
            "env": dict(env or {}),
            "log": str(log),
            "seconds": seconds,
        }
        answer = self._ask(request)
        logs = [Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(world)]
        return Run(answer["codes"], answer["seconds"], logs)

    def _ask(self, request: Mapping[str, object]) -> dict:
        if self._process is None:
            log = os.open(self.directory / "zygote.log", os.O_CREAT | os.O_WRONLY)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.hosts.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment(),
                cwd=Path(__file__).parents[2],
            )
            os.close(log)
            self._read()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote ended: {(self.directory / 'zygote.log').read_text()[-3000:]}")
        return json.loads(line)


def write_corpus(directory: Path, *, documents: int = 300, vocabulary: int = 8191, seed: int = 5) -> Path:
    """A small indexed dataset of random tokens; returns the prefix for `--data-path`."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(seed)
    prefix = directory / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(documents):
        length = int(generator.integers(20, 200))
        builder.add_document(torch.from_numpy(generator.integers(0, vocabulary, length)), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def tiny_gpt(prefix: Path, *, iterations: int = 4, hidden: int = 64, **changes: object) -> list[str]:
    """Flags of the tiny GPT that all cases share; `changes` replace or add flags (None removes one)."""
    flags: dict[str, object] = {
        "num_layers": 4,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": iterations,
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "clip_grad": 1.0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 8191,
        "data_path": prefix,
        "data_cache_path": f"{prefix}.cache",
        "split": "90,10,0",
        "num_workers": 0,
        "log_interval": 1,
        "eval_iters": 0,
        "eval_interval": 1000,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "no_masked_softmax_fusion": None,
        "distributed_timeout_minutes": 2,
    }
    flags.update(changes)
    return as_argv(flags)


def as_argv(flags: Mapping[str, object]) -> list[str]:
    """`{"a_b": 1, "c": True, "d": [1, 2], "e": None}` -> `--a-b 1 --c --d 1 2`."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        argv.append("--" + (name if "-" in name else name.replace("_", "-")))
        if isinstance(value, (list, tuple)):
            argv += map(str, value)
        elif value is not True:
            argv.append(str(value))
    return argv
