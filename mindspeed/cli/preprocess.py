"""`mindspeed preprocess`: turn text, JSONL or Parquet into the `.bin` and `.idx` files that training reads."""

from __future__ import annotations

import sys

from mindspeed.cli.messages import file_trouble
from mindspeed.errors import MindspeedError


def run(argv: list[str]) -> int:
    """Tokenize; returns the exit status: 0, 1 for files that cannot be read or written, 2 for what is refused."""
    from mindspeed.training import preprocess

    try:
        args = preprocess.build_parser().parse_args(argv)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 2
    try:
        done = preprocess.preprocess(args)
    except MindspeedError as error:
        print(f"mindspeed: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mindspeed: {file_trouble(error)}", file=sys.stderr)
        return 1
    rate = done.tokens / max(done.seconds, 1e-9)
    print(f"{done.documents} documents, {done.tokens} tokens in {done.seconds:.1f} s ({rate:,.0f} tokens/s)")
    for prefix in done.prefixes:
        print(f"  {prefix}.bin, .idx    train with --data-path {prefix}")
    return 0
