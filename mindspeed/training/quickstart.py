"""One rank of `mindspeed quickstart`: pretraining, then a sample of text from the first rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mindspeed.training.worker import guarded

SAMPLE_BYTES = 200
PROMPT = "def "


def flags(folder: Path) -> list[str]:
    """The training command of the quick start, for files below `folder`."""
    text = """
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 320 --seq-length 256
        --max-position-embeddings 256 --swiglu --normalization RMSNorm --position-embedding-type rope
        --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 4 --global-batch-size 8
        --train-iters 200 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1
        --adam-beta2 0.95 --clip-grad 1.0 --use-distributed-optimizer --tokenizer-type ByteTokenizer --split 98,1,1
        --log-interval 10 --eval-interval 100 --eval-iters 4 --num-workers 0 --save-interval 100 --seed 1234
        --no-create-attention-mask-in-dataloader --override-opt_param-scheduler
    """
    files = ["--data-path", folder / "stdlib_text_document", "--data-cache-path", folder / "cache"]
    places = ["--save", folder / "checkpoints", "--load", folder / "checkpoints", "--tensorboard-dir", folder / "tensorboard"]
    return [*text.split(), *map(str, [*files, *places, "--loss-plot", folder / "loss.png"])]


def main(argv: Sequence[str]) -> int:
    """Train with this command line and write `sample.txt` beside the loss curve."""

    def work() -> None:
        from mindspeed.host.level0 import import_core
        from mindspeed.platform import current

        import_core(current())
        from mindspeed.training import pretraining

        pretraining.pretrain(argv=list(argv), after_training=_write_sample)

    return guarded(work)


def _write_sample(model: list) -> None:
    import torch

    from mindspeed.training.checkpoint_state import unwrap_model
    from mindspeed.training.sampling import sample
    from mindspeed.training.session import get_args, get_tokenizer

    args, tokenizer = get_args(), get_tokenizer()
    if torch.distributed.get_rank() != 0 or args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1:
        return
    ids = sample(
        unwrap_model(model)[0],
        tokenizer.tokenize(PROMPT),
        SAMPLE_BYTES,
        context=args.seq_length,
        vocab_size=tokenizer.eod,  # bytes only: the end of a document would show as nothing
    )
    Path(args.loss_plot).with_name("sample.txt").write_text(PROMPT + tokenizer.detokenize(ids), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
