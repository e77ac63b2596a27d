"""Each rule alone gives its message, with flag, value, rule and remedy; all problems come at once."""

from __future__ import annotations

import runpy

import pytest
import torch

import mindspeed
from mindspeed.errors import ConfigError
from mindspeed.training.arguments import check_config, parse_args
from mindspeed.training.derive import derive
from mindspeed.training.initialize import settle_arguments
from mindspeed.training.validation import out_of_range, problems
from tests.training.runs import TINY


def told(flags: str, world_size: int = 1) -> list[str]:
    args = parse_args(argv=flags.split())
    args.world_size = world_size
    args.distributed_backend, args.transformer_impl, args.apply_rope_fusion = "gloo", "local", False
    wrong = out_of_range(args)
    derive(args)
    return [str(problem) for problem in problems(args, wrong)]


def test_good_flags_have_no_problem():
    assert told(TINY) == []


CASES = [
    ("--num-layers 3 --pipeline-model-parallel-size 2", 2, "--num-layers 3: must fill 2 pipeline stages evenly"),
    ("--tensor-model-parallel-size 2", 3, "world size 3: tensor 2 x pipeline 1 x context 1 = 2 ranks do not divide it"),
    (
        "--global-batch-size 3",
        2,
        "--global-batch-size 3: must be a multiple of micro batch 1 x 2 data-parallel ranks = 2. Use 2 or 4",
    ),
    ("--hidden-size 130", 1, "--hidden-size 130: 4 heads do not divide it"),
    (
        "--num-attention-heads 3 --hidden-size 96 --tensor-model-parallel-size 2",
        2,
        "--num-attention-heads 3: must be a multiple",
    ),
    ("--group-query-attention --num-query-groups 3", 1, "--num-query-groups 3: must divide the 4 heads"),
    ("--max-position-embeddings 16", 1, "--max-position-embeddings 16: must not be smaller than --seq-length 32"),
    (
        "--seq-length 31 --tensor-model-parallel-size 2 --sequence-parallel",
        2,
        "--seq-length 31: --sequence-parallel splits it over 2",
    ),
    ("--overlap-param-gather", 1, "--overlap-param-gather: needs --use-distributed-optimizer"),
    ("--overlap-param-gather --use-distributed-optimizer", 1, "--overlap-param-gather: needs --overlap-grad-reduce"),
    ("--fp16 --bf16", 1, "--fp16: cannot stand beside --bf16"),
    ("--recompute-granularity full", 1, "--recompute-granularity full: needs --recompute-method"),
    (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3",
        1,
        "--recompute-num-layers 3: must divide the",
    ),
    (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 0",
        1,
        "--recompute-num-layers 0: is no unit for --recompute-method uniform. Use 1 or more",
    ),
    ("--recompute-granularity selective --recompute-method block", 1, "--recompute-method block: belongs to"),
    ("--expert-model-parallel-size 2", 2, "--expert-model-parallel-size 2: needs --num-experts"),
    (
        "--num-experts 3 --expert-model-parallel-size 2",
        2,
        "--num-experts 3: must be a multiple of --expert-model-parallel-size 2",
    ),
    ("--num-experts 4", 1, "--num-experts 4: experts have no bias. Add --disable-bias-linear"),
    ("--num-experts 4 --moe-layer-freq [1,0]", 1, "--moe-layer-freq [1, 0]: describes 2 of 4 layers"),
    ("--num-experts 4 --moe-router-topk 5", 1, "--moe-router-topk 5: there are 4 experts"),
    ("--num-layers-per-virtual-pipeline-stage 1", 1, "needs 2 or more pipeline stages"),
    (
        "--num-layers-per-virtual-pipeline-stage 3 --pipeline-model-parallel-size 2",
        2,
        "4 layers do not fill 2 stages of equal chunks",
    ),
    ("--train-samples 8", 1, "--train-samples 8: cannot stand beside --train-iters"),
    ("--lr-warmup-samples 3", 1, "--lr-warmup-samples 3: does not fit a run that is measured in steps"),
    ("--rampup-batch-size 2 2 8", 1, "needs --train-samples"),
    ("--min-lr 1", 1, "--min-lr 1.0: must not exceed --lr 0.0002"),
    ("--lr-warmup-iters 3", 1, "--lr-warmup-iters 3: must be shorter than the whole schedule of 3. Use at most 2"),
    ("--lr-decay-style WSD", 1, "needs the length of its last phase"),
    ("--weight-decay-incr-style linear", 1, "needs its first and last value"),
    ("--save /tmp/x", 1, "--save /tmp/x: needs --save-interval"),
    ("--save pyproject.toml --save-interval 1", 1, "--save pyproject.toml: is not a folder"),
    ("--ckpt-format torch --async-save", 1, "--async-save: needs --ckpt-format torch_dist"),
    ("--data-path a", 1, "there is more than one source of data"),
    ("--tokenizer-type ByteTokenizer", 1, "mock documents hold ids up to 4096"),
    ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model nowhere", 1, "nowhere: there is no such file"),
    ("--position-embedding-type relative", 1, "is not a position embedding of the trainer's GPT"),
    ("--micro-batch-size 0", 1, "--micro-batch-size 0: must be at least 1"),
    ("--clip-grad -1", 1, "--clip-grad -1.0: must be at least 0"),
    ("--moe-grouped-gemm", 1, "--moe-grouped-gemm: needs --bf16"),
]


@pytest.mark.parametrize(("flags", "world_size", "expected"), CASES, ids=[case[0] for case in CASES])
def test_rule(flags, world_size, expected):
    found = told(f"{TINY} {flags}", world_size)
    assert any(expected in text for text in found), found
    assert all(text.count(". ") >= 1 and text.endswith(".") for text in found)  # a remedy follows the rule


def test_everything_missing_is_told_at_once():
    found = told("")
    for flag in ("--num-layers", "--hidden-size", "--lr", "--train-iters", "--data-path", "--tokenizer-type", "--seq-length"):
        assert any(text.startswith(f"{flag}: is required") for text in found), flag


def test_a_refused_run_leaves_torch_alone():
    import torch

    from mindspeed.training import pretraining, session

    before = torch.cuda.current_device
    with pytest.raises(ConfigError, match="2 problems"):
        pretraining.pretrain(argv=f"{TINY} --fp16 --bf16 --min-lr 3".split())
    assert torch.cuda.current_device is before
    assert not session.is_open() and not torch.distributed.is_initialized()


DERIVED = [
    ("--swiglu", "ffn_hidden_size", 320),
    ("", "ffn_hidden_size", 512),
    ("", "kv_channels", 32),
    ("--use-rotary-position-embeddings", "position_embedding_type", "rope"),
    ("--recompute-activations", "recompute_granularity", "selective"),
    ("--sequence-parallel", "sequence_parallel", False),
    ("--bf16", "accumulate_allreduce_grads_in_fp32", True),
    ("--fp16", "check_for_nan_in_loss_and_grad", False),
    ("--fp16 --loss-scale 4", "check_for_nan_in_loss_and_grad", True),
    ("--num-experts 0", "num_experts", None),
    ("--disable-bias-linear", "add_qkv_bias", False),
    ("", "end_weight_decay", 0.01),
    ("", "padded_vocab_size", 8192),
]


@pytest.mark.parametrize(("flags", "dest", "value"), DERIVED)
def test_derived_value(flags, dest, value):
    args = parse_args(argv=f"{TINY} {flags}".split())
    derive(args)
    problems(args)
    assert getattr(args, dest) == value


def test_documents_need_a_tokenizer_that_ends_them(monkeypatch):
    """A SentencePiece model may lack the token; it then answers -1."""
    from types import SimpleNamespace

    flags = f"{TINY} --reset-attention-mask --eod-mask-loss"
    assert told(flags) == []
    monkeypatch.setattr("mindspeed.training.validation.build_tokenizer", lambda args: SimpleNamespace(eod=-1, vocab_size=8192))
    words = ": needs a token that ends a document, which None has not. Choose another tokenizer or remove the flag."
    assert told(flags) == [f"--reset-attention-mask{words}", f"--eod-mask-loss{words}"]
    assert told(TINY) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-experts 4 --disable-bias-linear --moe-router-enable-expert-bias", "only supports sigmoid score function"),
        ("--recompute-granularity selective --recompute-modules foo", r"Invalid choices for recompute_modules: \{'foo'\}"),
    ],
)
def test_what_the_model_configuration_refuses_is_one_error_before_anything_starts(flags, words):
    with pytest.raises(ConfigError, match=rf"model configuration: is refused by megatron-core: .*{words}"):
        settle_arguments(argv=f"{TINY} {flags}".split())
    assert mindspeed.patches() == () and not torch.distributed.is_initialized()


def test_a_bare_assertion_of_the_model_configuration_is_quoted(monkeypatch, tmp_path):
    (tmp_path / "host.py").write_text("def refuse(args, experts=3):\n    assert experts % 2 == 0\n")
    refuse = runpy.run_path(str(tmp_path / "host.py"))["refuse"]
    monkeypatch.setattr("mindspeed.training.arguments.core_transformer_config_from_args", refuse)
    with pytest.raises(ConfigError, match="model configuration: .* megatron-core demands: experts % 2 == 0"):
        check_config(parse_args(argv=TINY.split()))


@pytest.mark.parametrize("kind", ["tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor"])
def test_a_parallel_size_of_zero_is_refused_before_anything_is_divided_by_it(kind):
    with pytest.raises(ConfigError, match=f"--{kind}-parallel-size 0: must be at least 1"):
        settle_arguments(argv=f"{TINY} --{kind}-parallel-size 0".split())
