"""A save that is killed, or fails, at any of its file-system calls loses nothing and needs no help."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from mindspeed.checkpoint import find_checkpoint, read_tracker
from mindspeed.errors import CheckpointError
from mindspeed.testing.faults import SHORT_WRITE, FileCalls
from tests.checkpoint._toy import fingerprint, loaded, remains, run_save, state_of

FORMATS = ("torch", "torch_dist")
OLD, NEW, NEXT = 2, 4, 6


def saves_before(scenario: str) -> list[tuple[int, int]]:
    """(iteration, salt) of the checkpoints that exist before the save of NEW with salt 1."""
    return {"first": [], "later": [(OLD, 0)], "overwrite": [(OLD, 0), (NEW, 0)]}[scenario]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Template directories, and the calls of an undisturbed save."""
    templates = {}
    for format in FORMATS:
        for scenario in ("first", "later", "overwrite"):
            root = tmp_path_factory.mktemp(f"{format}-{scenario}") / "save"
            for iteration, salt in saves_before(scenario):
                run_save(root, iteration, format, salt)
            scratch = root.parent / "scratch"
            if root.exists():
                shutil.copytree(root, scratch)
            with FileCalls() as seen:
                run_save(scratch, NEW, format, salt=1)
            templates[format, scenario] = (root, seen.calls)
    return templates


def fresh(template: Path, place: Path) -> Path:
    if template.exists():
        shutil.copytree(template, place)
    return place


def save_in_child(root: Path, format: str, k: int) -> int:
    """Run the save in a forked child that dies at call k; returns the signal that ended it (0: none)."""
    child = os.fork()
    if child == 0:
        try:
            with FileCalls(at=k):
                run_save(root, NEW, format, salt=1)
            os._exit(0)
        except BaseException as error:  # a child must never return into the test runner
            print(f"call {k}: {error!r}", file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def assert_whole(root: Path, format: str, scenario: str) -> int | None:
    """What loads is one of the saves, bit for bit; returns its iteration."""
    found = find_checkpoint(root, save=root)
    if found is None:
        assert scenario == "first"
        return None
    possible = [(NEW, 1), *saves_before(scenario)]
    state = loaded(found, format)
    assert state["iteration"] == found.iteration
    contents = {fingerprint(state_of(it, 0, salt)) for it, salt in possible if it == found.iteration}
    assert fingerprint(state) in contents
    # The tracker never names what is not there; before its first writing it is merely absent.
    assert found.warning == "" or (scenario == "first" and "is missing" in found.warning)
    # Nothing older than what the tracker named before may come back.
    assert found.iteration >= max((it for it, _ in saves_before(scenario)), default=0)
    return found.iteration


def assert_next_save_heals(root: Path, format: str) -> None:
    run_save(root, NEXT, format)
    assert remains(root) == []
    assert read_tracker(root) == (NEXT, "")
    found = find_checkpoint(root, save=root)
    assert (found.iteration, found.warning) == (NEXT, "")
    assert fingerprint(loaded(found, format)) == fingerprint(state_of(NEXT))


@pytest.mark.parametrize("scenario", ["first", "later", "overwrite"])
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_every_call(prepared, tmp_path, caplog, format, scenario):
    template, calls = prepared[format, scenario]
    assert len(calls) > 15
    outcomes = []
    for k in range(len(calls)):
        root = fresh(template, tmp_path / f"{k}")
        assert save_in_child(root, format, k) == signal.SIGKILL
        outcomes.append(assert_whole(root, format, scenario))
        assert_next_save_heals(root, format)
        shutil.rmtree(root)
    # The sweep saw both sides of the moment that counts.
    assert outcomes[0] != NEW or scenario == "overwrite"
    assert outcomes[-1] == NEW


@pytest.mark.parametrize("scenario", ["first", "later", "overwrite"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_error_at_every_call(prepared, tmp_path, caplog, format, scenario, number):
    template, calls = prepared[format, scenario]
    failures = 0
    for k in range(len(calls)):
        root = fresh(template, tmp_path / f"{k}")
        before = read_tracker(root) if root.exists() else None
        try:
            with FileCalls(at=k, fault=number):
                run_save(root, NEW, format, salt=1)
        except CheckpointError as error:
            failures += 1
            assert errno.errorcode[number] in str(error)
            assert str(root) in str(error)
            assert "Remedy" in str(error)
            if before is not None:
                assert read_tracker(root) == before
        else:
            assert read_tracker(root) == (NEW, "")
        assert_whole(root, format, scenario)
        assert_next_save_heals(root, format)
        shutil.rmtree(root)
    assert failures > len(calls) // 2


@pytest.mark.parametrize("format", FORMATS)
def test_short_write_at_every_call(prepared, tmp_path, format):
    template, calls = prepared[format, "later"]
    writes = [k for k, call in enumerate(calls) if call.startswith("write")]
    assert writes
    for k in writes:
        root = fresh(template, tmp_path / f"{k}")
        with FileCalls(at=k, fault=SHORT_WRITE):
            run_save(root, NEW, format, salt=1)
        assert assert_whole(root, format, "later") == NEW
        shutil.rmtree(root)


def test_training_goes_on_where_asked(prepared, tmp_path, caplog):
    template, calls = prepared["torch", "later"]
    for k in range(len(calls)):
        root = fresh(template, tmp_path / f"{k}")
        with FileCalls(at=k, fault=errno.ENOSPC):
            save = run_save(root, NEW, "torch", keep_training=True)
        if save.failure is not None:
            assert "ENOSPC" in str(save.failure)
            assert "Training goes on" in caplog.text
            assert read_tracker(root) == (OLD, "")
        assert_next_save_heals(root, "torch")
        shutil.rmtree(root)


def test_killed_while_recovering(prepared, tmp_path, caplog):
    """Recovery itself may be interrupted anywhere, too."""
    template, calls = prepared["torch", "overwrite"]
    middle = next(k for k, call in enumerate(calls) if call.startswith("rename") and ".saving" in call)
    for k in range(8):
        root = fresh(template, tmp_path / f"{k}")
        assert save_in_child(root, "torch", middle) == signal.SIGKILL
        assert any(name.startswith(".replaced") for name in remains(root))
        save_in_child(root, "torch", k)
        assert assert_whole(root, "torch", "overwrite") == NEW
        assert_next_save_heals(root, "torch")
        shutil.rmtree(root)
