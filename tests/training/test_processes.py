"""Whole jobs in processes of their own: SIGTERM, SIGKILL, disagreeing ranks, the quick start."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.runs import LINE, TINY

ROOT = Path(__file__).parents[2]
DROPOUT = TINY.replace("--attention-dropout 0 --hidden-dropout 0", "--attention-dropout 0.1 --hidden-dropout 0.1")


def job(words: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    """`mindspeed pretrain` with these words; its output goes to a file that grows as it trains."""
    code = "import sys; from mindspeed.cli.pretrain import run; sys.exit(run(sys.argv[1:]))"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    output = open(folder / f"{len(list(folder.glob('*.out')))}.out", "w")
    return subprocess.Popen([sys.executable, "-c", code, *words], env=variables, stdout=output, stderr=subprocess.STDOUT)


def text(folder: Path, number: int) -> str:
    return (folder / f"{number}.out").read_text()


def curve(folder: Path, number: int) -> list[tuple[str, str, str]]:
    matches = [match for line in text(folder, number).splitlines() if (match := LINE.match(line))]
    return [(match["iteration"], match["loss"], match["norm"]) for match in matches]


def wait_for_step(folder: Path, number: int, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not any(int(found) >= step for found, _, _ in curve(folder, number)):
        assert time.monotonic() < deadline and process.poll() is None, text(folder, number)
        time.sleep(0.01)


@pytest.mark.timeout(400)
def test_sigterm_then_sigkill_then_the_end(tmp_path):
    """One job of two ranks, stopped politely once and killed once at random; its lines are those of the undisturbed job."""
    steps = 30
    flags = f"{DROPOUT} --train-iters {steps} --use-distributed-optimizer --data-cache-path {tmp_path}/cache"
    words = ["--nproc", "2", *flags.split()]
    saving = ["--save", f"{tmp_path}/ckpt", "--load", f"{tmp_path}/ckpt", "--save-interval", "3"]
    assert job(words, tmp_path).wait(timeout=200) == 0
    whole = curve(tmp_path, 0)
    assert len(whole) == steps

    polite = job([*words, *saving], tmp_path)
    wait_for_step(tmp_path, 1, 4, polite)
    polite.send_signal(signal.SIGTERM)
    assert polite.wait(timeout=60) == 0, text(tmp_path, 1)
    stopped = int(curve(tmp_path, 1)[-1][0])
    tracker = tmp_path / "ckpt" / "latest_checkpointed_iteration.txt"
    assert 4 <= stopped < steps and int(tracker.read_text()) == stopped
    assert "exiting program after receiving SIGTERM" in text(tmp_path, 1)

    killed = job([*words, *saving], tmp_path)
    wait_for_step(tmp_path, 2, min(stopped + random.randint(1, 6), steps - 3), killed)
    killed.kill()
    killed.wait()
    time.sleep(1.5)  # the ranks notice within a second that their launcher has gone
    assert curve(tmp_path, 2)[0] == whole[stopped]

    last = job([*words, *saving], tmp_path)
    assert last.wait(timeout=200) == 0, text(tmp_path, 3)
    resumed = curve(tmp_path, 3)
    assert resumed == whole[int(resumed[0][0]) - 1 :]
    assert curve(tmp_path, 1) == whole[:stopped]


def test_ranks_that_were_started_differently_are_refused(tmp_path):
    from tests.training.test_megatron_lm import free_port

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    ranks = [job([*TINY.split(), "--clip-grad", str(1 + rank)], tmp_path, RANK=str(rank), **meeting) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [2, 2]
    assert "--clip-grad: differs between ranks: rank 0 has 1.0, rank 1 has 2.0" in text(tmp_path, 0)


def test_quickstart(tmp_path, monkeypatch, capsys):
    from mindspeed.cli import quickstart

    monkeypatch.setattr(quickstart, "corpus", lambda folder: sorted(folder.glob("[a-t]*.py")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    assert quickstart.run([str(tmp_path / "qs"), "--nproc", "1", "--train-iters", "20"]) == 0
    told = capsys.readouterr().out
    folder = tmp_path / "qs"
    losses = [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines() if '"train"' in line]
    assert losses[-1] < losses[0] < 6
    assert f"{losses[0]:.2f} at step 10, {losses[-1]:.2f} at step 20" in told
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "20"
    assert len((folder / "sample.txt").read_text(encoding="utf-8").encode()) >= 100
    assert "a sample of 200 bytes" in told and "mindspeed preprocess" in told


def test_corpus_is_python_without_its_tests():
    import sysconfig

    from mindspeed.cli.quickstart import corpus

    files = corpus(Path(sysconfig.get_paths()["stdlib"]))
    assert any(path.name == "argparse.py" for path in files)
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
    assert 2e6 < sum(path.stat().st_size for path in files) < 5e7
