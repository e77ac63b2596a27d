"""`mindspeed preprocess`: turn text, JSONL or Parquet into the `.bin` and `.idx` files that training reads."""

from __future__ import annotations

import sys

from mindspeed.errors import MindspeedError


def run(argv: list[str]) -> int:
    """Tokenize; returns the exit status: 0, 1 for unusable input, 2 for a wrong command line."""
    from mindspeed.training import preprocess

    try:
        args = preprocess.build_parser().parse_args(argv)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 2
    try:
        done = preprocess.preprocess(args)
    except MindspeedError as error:
        print(f"mindspeed: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"mindspeed: {error.filename}: {error.strerror}. Check the path and the space left.", file=sys.stderr)
        return 1
    rate = done.tokens / max(done.seconds, 1e-9)
    print(f"{done.documents} documents, {done.tokens} tokens in {done.seconds:.1f} s ({rate:,.0f} tokens/s)")
    for prefix in done.prefixes:
        print(f"  {prefix}.bin, .idx    train with --data-path {prefix}")
    return 0
