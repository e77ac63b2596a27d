"""`mindspeed pretrain`: train a GPT with the built-in trainer, on one process or on several of this machine."""

from __future__ import annotations

import os
import sys

USAGE = """usage: mindspeed pretrain [--nproc N] <training flags>

  --nproc N   start N processes on this machine (default 1); under torchrun leave it out

Training flags have the names of Megatron-LM; `mindspeed pretrain --help` lists them with those of all features.
Example: mindspeed pretrain --nproc 2 --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 256 \\
    --max-position-embeddings 256 --micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --train-iters 100 \\
    --data-path my_text --tokenizer-type ByteTokenizer --split 95,5,0
"""


def split_nproc(argv: list[str]) -> tuple[int | None, list[str]]:
    """Take `--nproc N` (or `--nproc=N`) out of a command line.

    Raises:
        ValueError: it is not a positive number.
    """
    nproc: int | None = None
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--nproc" or word.startswith("--nproc="):
            text = word.partition("=")[2] if "=" in word else next(words, "")
            if not text.isdigit() or int(text) < 1:
                raise ValueError(f"--nproc {text}: must be a positive number. Give the number of processes, e.g. --nproc 2.")
            nproc = int(text)
        else:
            rest.append(word)
    return nproc, rest


def run(argv: list[str]) -> int:
    """Train; returns the exit status: 0, 1 after a failure, 2 for a command line that cannot be honoured."""
    try:
        nproc, rest = split_nproc(argv)
    except ValueError as error:
        print(f"mindspeed: {error}", file=sys.stderr)
        return 2
    if not rest:
        print(USAGE, end="")
        return 2
    if nproc is not None and "RANK" in os.environ:
        print("mindspeed: --nproc: the processes were started already (RANK is set). Leave it out.", file=sys.stderr)
        return 2
    asks_help = bool({"-h", "--help"} & set(rest))
    if not asks_help and nproc is not None and nproc > 1:
        from mindspeed.training.launch import launch

        return launch(nproc, rest)
    from mindspeed.training.worker import main

    return main(rest)
