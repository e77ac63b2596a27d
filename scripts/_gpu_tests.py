"""Runs the tests marked `cuda` so that one that kills its process, or the GPU's context in it, does not take others along.

Usage: `_gpu_tests.py FOLDER SECONDS [SHARDS]`. Every test is written to `FOLDER/tests-<shard>.jsonl` when it starts and when it
ends. A process that died, or whose GPU answers nothing but errors any more, is replaced by one that goes on with the tests that
are left. Shards run side by side: the first calls of kernels compile, which needs processors and not the GPU. Exit codes are
pytest's: 0 fine, 1 a test failed, 2 not all could run, 124 out of time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"mark\.cuda\b|\bon_cuda\(")
LATE = ("test_triton_cuda.py", "test_flex_attention.py")
"""Files whose tests compile most; the others come first."""

SICK = 86
"""Exit code of a process whose GPU context is lost."""


def files(root: Path) -> list[str]:
    """Test files that mention the mark: collecting the whole tree takes a minute."""
    found = [path for path in sorted((root / "tests").rglob("test_*.py")) if MARKED.search(path.read_text())]
    return [str(path.relative_to(root)) for path in sorted(found, key=lambda path: path.name in LATE)]


def read(path: Path) -> tuple[dict[str, dict[str, Any]], list[str], bool]:
    """(results by test, tests that started and did not end, whether the last process came to its end) of one shard."""
    results: dict[str, dict[str, Any]] = {}
    started: list[str] = []
    finished = False
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
            row = json.loads(line)
            finished = row.get("finished", False)
            if "started" in row:
                started.append(row["started"])
            elif "id" in row:
                results[row["id"]] = row
    return results, [name for name in started if name not in results], finished


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row so that it outlives the process."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


# ---- inside of pytest ---------------------------------------------------------------------------------------------------------


def _log() -> Path:
    return Path(os.environ["GPU_CHECK_LOG"])


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this shard's tests that have not run yet."""
    index, count = map(int, os.environ["GPU_CHECK_SHARD"].split("/"))
    done = read(_log())[0]
    kept = [item for item in items[index::count] if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """Who dies in it is known afterwards."""
    write(_log(), {"started": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    """One row for each test; a failure of its set-up counts as its own."""
    if report.when == "call" or (report.when == "setup" and not report.passed):
        message = "" if report.passed else _first_line(report)
        write(
            _log(), {"id": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "message": message}
        )


def _first_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def pytest_runtest_teardown(item: Any, nextitem: Any) -> None:
    """After an error of the device every later call in this process fails: leave it."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            message = f"the GPU's context is lost: {str(error).splitlines()[0]}"
            write(_log(), {"id": item.nodeid, "outcome": "failed", "seconds": 0.0, "message": message[:300]})
            print(f"{item.nodeid} lost the GPU: {error}", file=sys.stderr, flush=True)
            os._exit(SICK)


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """All tests of the shard have run, unless it was interrupted or could not collect."""
    write(_log(), {"finished": int(exitstatus) in (0, 1, 5), "exit": int(exitstatus)})


# ---- outside ------------------------------------------------------------------------------------------------------------------


def start(folder: Path, shard: int, shards: int) -> subprocess.Popen[bytes]:
    """A pytest process for the tests of a shard that are left."""
    environment = {
        **os.environ, "GPU_CHECK_LOG": str(folder / f"tests-{shard}.jsonl"), "GPU_CHECK_SHARD": f"{shard}/{shards}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-p", "no:cacheprovider", "-m", "cuda", "-q"]
    command += ["--timeout", "60", "--timeout-method", "thread", "--tb", "short", *files(ROOT)]
    with (folder / f"tests-{shard}.log").open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def mourn(log: Path) -> bool:
    """Put down the tests that a process died in; False if it died before any."""
    _, open_tests, _ = read(log)
    for name in open_tests:
        write(log, {"id": name, "outcome": "failed", "seconds": 0.0, "message": "the process died in this test"})
    return bool(open_tests)


def run(folder: Path, seconds: float, shards: int) -> int:
    """Run all shards to their end, or to the end of the time."""
    deadline, started = time.monotonic() + seconds, {}
    running = {shard: start(folder, shard, shards) for shard in range(shards)}
    for shard in running:
        started[shard] = 1
    code = 0
    while running and time.monotonic() < deadline:
        time.sleep(0.2)
        for shard, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[shard]
            log = folder / f"tests-{shard}.jsonl"
            if read(log)[2]:
                continue
            if mourn(log) or (process.returncode == SICK and started[shard] < 20):
                running[shard], started[shard] = start(folder, shard, shards), started[shard] + 1
            else:
                code = 2  # it could not even begin
    for process in running.values():
        process.kill()
        process.wait()
    if running:
        return 124
    failed = any(
        row["outcome"] == "failed" for shard in range(shards) for row in read(folder / f"tests-{shard}.jsonl")[0].values()
    )
    return code or int(failed)


def main() -> int:
    """Start afresh in the folder and run."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    shards = int(sys.argv[3]) if len(sys.argv) > 3 else max(1, min(4, (os.cpu_count() or 1) // 3))
    for old in (*folder.glob("tests-*.jsonl"), *folder.glob("tests-*.log")):
        old.unlink()
    return run(folder, seconds, shards)


if __name__ == "__main__":
    sys.exit(main())
