"""Megatron-LM's own script and the trainer: the same lines, and checkpoints that go both ways."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import LINE, TINY, train

CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
pytestmark = [
    pytest.mark.megatron_lm,
    pytest.mark.skipif(not CHECKOUT, reason="set MEGATRON_LM_PATH to a Megatron-LM core_v0.12.1 checkout"),
]
FLAGS = (
    TINY.replace("--attention-dropout 0 --hidden-dropout 0", "--attention-dropout 0.1 --hidden-dropout 0.1").replace(
        " --no-progress", ""
    )
    + " --train-iters 4 --use-distributed-optimizer --log-params-norm --log-num-zeros-in-grad --eval-iters 1 --eval-interval 50"
)
SCRIPT = """
import runpy, sys
import mindspeed.megatron_adaptor
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def megatron_lm(folder: Path, flags: str) -> str:
    """Standard output of Megatron-LM's pretrain_gpt.py, retargeted by the one import line, on one rank."""
    entry = folder / "host.py"
    entry.write_text(SCRIPT.format(script=f"{CHECKOUT}/pretrain_gpt.py"))
    environment = {
        **os.environ, "PYTHONPATH": f"{CHECKOUT}:{Path(__file__).parents[2]}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(entry), *flags.split()], env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def shown(text: str) -> list[tuple[str, ...]]:
    """What log lines say, apart from times."""
    names = ("iteration", "samples", "lr", "batch", "loss", "scale", "norm", "zeros", "params", "skipped", "nan")
    return [tuple(match[name] for name in names) for line in text.splitlines() if (match := LINE.match(line))]


def validation(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(" validation loss")]


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_checkpoints_go_both_ways(form, tmp_path):
    flags = f"{FLAGS} --ckpt-format {form} --data-cache-path {tmp_path}/cache"
    ours = train(f"{flags} --save {tmp_path}/ours --save-interval 2")
    expected = shown(ours.text)
    assert len(expected) == 4

    (tmp_path / "ours" / "latest_checkpointed_iteration.txt").write_text("2")
    theirs = megatron_lm(tmp_path, f"{flags} --load {tmp_path}/ours --save {tmp_path}/theirs --save-interval 1")
    assert shown(theirs) == expected[2:]
    assert validation(theirs) == validation(ours.text)

    shutil.rmtree(tmp_path / "theirs" / "iter_0000004")
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("3")
    again = train(f"{flags} --load {tmp_path}/theirs")
    assert shown(again.text) == expected[3:]
    assert again.digest == ours.digest


def test_operations_are_counted_as_there(tmp_path):
    """The functions are compared in a process of their own: a checkout and a package cannot share one."""
    program = tmp_path / "flops.py"
    program.write_text(
        "import json, sys\n"
        "import mindspeed.megatron_adaptor\n"
        "from argparse import Namespace\n"
        "from megatron.training.training import num_floating_point_operations as theirs\n"
        "from mindspeed.training.flops import num_floating_point_operations as ours\n"
        "cases = json.loads(sys.argv[1])\n"
        "print('RESULT', json.dumps([[theirs(Namespace(**case), 8), ours(Namespace(**case), 8)] for case in cases]))\n"
    )
    base = {
        "is_hybrid_model": False, "num_layers": 6, "hidden_size": 96, "num_attention_heads": 6, "kv_channels": 16,
        "ffn_hidden_size": 200, "seq_length": 64, "padded_vocab_size": 512, "swiglu": False, "group_query_attention": False,
        "num_query_groups": 6, "num_experts": None, "moe_layer_freq": 1, "moe_router_topk": 2, "moe_ffn_hidden_size": None,
        "moe_shared_expert_intermediate_size": None, "mtp_num_layers": None, "multi_latent_attention": False,
        "q_lora_rank": None, "kv_lora_rank": 32, "qk_head_dim": 24, "qk_pos_emb_head_dim": 8, "v_head_dim": 20,
    }  # fmt: skip
    changes = [
        {}, {"swiglu": True}, {"group_query_attention": True, "num_query_groups": 2}, {"kv_channels": 32},
        {"num_experts": 4, "moe_layer_freq": 2, "moe_ffn_hidden_size": 77, "moe_shared_expert_intermediate_size": 33},
        {"num_experts": 4, "moe_layer_freq": [0, 0, 1, 1, 1, 1], "mtp_num_layers": 2}, {"mtp_num_layers": 1},
        {"multi_latent_attention": True}, {"multi_latent_attention": True, "q_lora_rank": 40, "swiglu": True},
    ]  # fmt: skip
    cases = json.dumps([base | change for change in changes])
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{Path(__file__).parents[2]}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, str(program), cases], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = json.loads(done.stdout.split("RESULT", 1)[1])
    for change, (theirs, ours) in zip(changes, pairs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12), change


def test_token_files_are_the_same_bytes(tmp_path):
    rows = [{"text": f"document {i} " + "wörd " * i} for i in range(7)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary, merges = byte_level_vocabulary(tmp_path)
    shared = f"--input {source} --tokenizer-type GPT2BPETokenizer --vocab-file {vocabulary} --merge-file {merges} --append-eod"
    from mindspeed.cli import preprocess

    assert preprocess.run([*shared.split(), "--output-prefix", str(tmp_path / "ours")]) == 0
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        f"{CHECKOUT}/tools/preprocess_data.py",
        *shared.split(),
        "--output-prefix",
        str(tmp_path / "theirs"),
    ]
    done = subprocess.run([*command, "--workers", "1"], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{who}_text_document.{suffix}" for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes(), suffix


def byte_level_vocabulary(folder: Path) -> tuple[Path, Path]:
    """A GPT-2 vocabulary of the 256 byte symbols and the end of text, without merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder / "vocab.json", folder / "merges.txt"
