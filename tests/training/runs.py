"""Short runs of the trainer inside the test's own rank, and their log lines read as Megatron-LM's tools read them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch

TINY = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 2e-4 --lr-decay-style cosine --train-iters 3 --log-interval 1 "
    "--eval-iters 0 --num-workers 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 8191 "
    "--attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader --no-progress"
)
# as in Megatron-LM's own functional tests and log parsers
LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(?P<iteration>\d+)/ *(?P<of>\d+) \| consumed samples: +(?P<samples>\d+) \|"
    r"(?: skipped samples: +\d+ \|)? elapsed time per iteration \(ms\): (?P<ms>\d+\.\d) \|"
    r"(?: throughput per GPU \(TFLOP/s/GPU\): (?P<tflops>\d+\.\d) \|)? learning rate: (?P<lr>\d\.\d{6}E[+-]\d\d) \|"
    r"(?: decoupled learning rate: \d\.\d{6}E[+-]\d\d \|)? global batch size: +(?P<batch>\d+) \|(?: lm loss: (?P<loss>\d\.\d{6}E[+-]\d\d) \|)?(?P<more>(?: [a-z_0-9 ]+: [^|]+ \|)*?)"
    r" loss scale: (?P<scale>\d+\.\d) \|(?: grad norm: (?P<norm>\d+\.\d{3}) \|)?(?: num zeros: (?P<zeros>[\d.]+) \|)?"
    r"(?: params norm: (?P<params>\d+\.\d{3}) \|)? number of skipped iterations: +(?P<skipped>\d+) \|"
    r" number of nan iterations: +(?P<nan>\d+) \|$"
)


@dataclass(frozen=True)
class Run:
    """What a run printed on this rank, where it ended, and a hash of this rank's weights."""

    text: str
    iteration: int
    digest: str

    @property
    def lines(self) -> list[re.Match[str]]:
        """Log lines."""
        return [match for line in self.text.splitlines() if (match := LINE.match(line))]

    @property
    def curve(self) -> list[tuple[str, str, str]]:
        """Iteration, loss and gradient norm in every printed digit."""
        return [(line["iteration"], line["loss"], line["norm"]) for line in self.lines]

    @property
    def timeless(self) -> list[str]:
        """Log and validation lines without times."""
        kept = [line for line in self.text.splitlines() if " iteration " in line and "datetime" not in line]
        return [
            re.sub(r"^ \[[^]]*\]|elapsed time per iteration \(ms\): [^|]*", "", line)
            for line in kept
            if "checkpoint" not in line
        ]


def train(flags: str, *more: object) -> Run:
    """Train in this rank; `more` are further words of the command line."""
    from mindspeed.training import pretraining

    words = [*flags.split(), *map(str, more)]
    printed, digest = io.StringIO(), hashlib.sha256()

    def hash_weights(model):
        for chunk in model:
            for name, weight in chunk.named_parameters():
                digest.update(name.encode())
                digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    with contextlib.redirect_stdout(printed):
        result = pretraining.pretrain(argv=words, after_training=hash_weights)
    return Run(printed.getvalue(), result.iteration, digest.hexdigest())


def seed_checkpoint(folder: Path, flags: str = TINY) -> str:
    """Save random weights at step 1 with learning rate 0; returns the flags that start another run from them."""
    train(f"{flags} --train-iters 1 --lr 0 --min-lr 0 --save {folder} --save-interval 1 --data-cache-path {folder}/cache")
    return f"--load {folder} --finetune --no-load-optim --no-load-rng --data-cache-path {folder}/cache"


def assert_same_digits(ours: list[tuple[str, str, str]], expected: list[tuple[str, str, str]]) -> None:
    """Compare curves in every printed digit, where a sum in another order may turn the last one by one."""
    assert [step for step, _, _ in ours] == [step for step, _, _ in expected]
    for (step, loss, norm), (_, loss_expected, norm_expected) in zip(ours, expected, strict=True):
        assert abs(float(loss) - float(loss_expected)) < 1.5e-6, f"loss at step {step}: {loss}, expected {loss_expected}"
        assert abs(float(norm) - float(norm_expected)) < 1.5e-3, f"grad norm at step {step}: {norm}, expected {norm_expected}"
