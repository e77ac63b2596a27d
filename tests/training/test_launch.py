"""The launcher: environment of ranks, the first failure told last, signals, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed.cli.pretrain import run, split_nproc
from mindspeed.training.launch import Launcher

ROOT = str(Path(__file__).parents[2])


def launched(action: str, folder: Path, ranks: int = 2) -> int:
    environment = {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    return Launcher(ranks, [action, str(folder)], module="tests.training.toy_rank", environment=environment).run()


def alive(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    return [
        pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    ]


def test_every_rank_gets_its_place(tmp_path):
    assert launched("environment", tmp_path, 3) == 0
    told = {(tmp_path / f"rank{rank}").read_text() for rank in range(3)}
    (one,) = told
    assert one.startswith("3 127.0.0.1 ")


def test_first_failure_is_told_last_with_its_traceback(tmp_path, capfd):
    assert launched("fail-first", tmp_path) == 1
    error = capfd.readouterr().err
    assert error.rstrip().splitlines()[-1] == "mindspeed: rank 1: RuntimeError: the cause"
    assert error.count("Traceback") == 1 and "a consequence" not in error


def test_killed_rank_is_named(tmp_path, capfd):
    assert launched("killed", tmp_path) == 128 + signal.SIGKILL
    assert "rank 1: was killed by SIGKILL" in capfd.readouterr().err
    assert not alive(tmp_path)


def test_refusal_is_told_once_without_a_rank(tmp_path, capfd):
    assert launched("refuse", tmp_path) == 2
    error = capfd.readouterr().err
    assert error.count("--x 1: is wrong. Use 2.") == 1 and "rank" not in error and "Traceback" not in error


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path, capfd):
    begun = time.monotonic()
    assert launched("stubborn", tmp_path) == 1
    assert time.monotonic() - begun < 30
    assert not alive(tmp_path)
    assert "the cause" in capfd.readouterr().err


def outside(action: str, folder: Path) -> subprocess.Popen:
    """The launcher in a process of its own, with both ranks ready."""
    code = (
        "import sys; from mindspeed.training.launch import Launcher; "
        f"sys.exit(Launcher(2, [{action!r}, {str(folder)!r}], module='tests.training.toy_rank').run())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=folder)
    deadline = time.monotonic() + 60
    while not all((folder / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_ranks(tmp_path, number):
    process = outside("wait", tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=20) == 0
    assert not alive(tmp_path)


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    process = outside("sleep", tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while alive(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_nproc_is_taken_out_of_the_command_line():
    assert split_nproc(["--lr", "1", "--nproc", "2", "--bf16"]) == (2, ["--lr", "1", "--bf16"])
    assert split_nproc(["--nproc=3"]) == (3, [])
    assert split_nproc(["--lr", "1"]) == (None, ["--lr", "1"])


@pytest.mark.parametrize("words", [["--nproc", "0"], ["--nproc"], ["--nproc=two"], []])
def test_wrong_command_lines(words, capsys):
    assert run(words) == 2
    told = capsys.readouterr()
    assert "--nproc" in told.err + told.out


def test_nproc_inside_a_rank_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert run(["--nproc", "2", "--lr", "1"]) == 2
    assert "started already" in capsys.readouterr().err
