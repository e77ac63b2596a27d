"""Two jobs with one --save."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mindspeed.checkpoint import SaveLock
from mindspeed.checkpoint.layout import LOCK
from mindspeed.errors import CheckpointError

HOLDER = """
import sys, time
from mindspeed.checkpoint.lock import SaveLock
SaveLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_job(tmp_path):
    job = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "held\n"
    yield job
    job.kill()
    job.wait()
    job.stdout.close()


def test_second_job_is_refused_by_name_and_welcome_after_a_kill(tmp_path, other_job):
    with pytest.raises(CheckpointError) as caught:
        SaveLock(tmp_path).acquire()
    for word in ("--save", str(tmp_path), str(other_job.pid), socket.gethostname(), time.strftime("%Y-%m-%d")):
        assert word in str(caught.value)
    os.kill(other_job.pid, signal.SIGKILL)
    other_job.wait()
    with SaveLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_released_lock_is_free(tmp_path):
    with SaveLock(tmp_path / "new"):
        pass
    with SaveLock(tmp_path / "new"):
        pass


def test_same_process_cannot_take_it_twice(tmp_path):
    with SaveLock(tmp_path), pytest.raises(CheckpointError, match=str(os.getpid())):
        SaveLock(tmp_path).acquire()


def write_lock(tmp_path, **changes):
    import psutil

    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "started": "then",
        "job": "",
    }
    (tmp_path / LOCK).write_text(json.dumps({**me, **changes}))


def test_pid_given_to_another_process_is_stale(tmp_path):
    write_lock(tmp_path, created=1.0)
    with SaveLock(tmp_path):
        pass


def test_other_machine_is_believed(tmp_path):
    write_lock(tmp_path, host="node-17", pid=1)
    with pytest.raises(CheckpointError, match=r"process 1 on node-17.*remove .*\.mindspeed_lock"):
        SaveLock(tmp_path).acquire()


def test_restart_of_the_same_job_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    write_lock(tmp_path, host="node-17", job="42")
    with SaveLock(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_lock_of_a_job_killed_while_writing_it(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with SaveLock(tmp_path):
        pass


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"errno.*Remedy"):
        SaveLock(tmp_path / "file" / "save").acquire()
