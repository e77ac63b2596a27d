"""A process that has imported torch, Megatron-LM and the adaptor once, and forks the ranks of each run.

Reads one JSON object a line from standard input: `{"script", "argv", "world", "env", "log", "seconds"}`, and
answers with `{"codes", "seconds"}`. Output of rank r goes to `<log>.<r>`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
import warnings

from mindspeed.testing.zygote import die_with_parent


def main() -> None:
    """Import, say so, then serve runs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed from here on is no answer
    warnings.simplefilter("ignore")
    sys.path.insert(0, os.environ["MEGATRON_LM_PATH"])
    import torch

    torch.set_num_threads(1)
    if os.environ.get("ZYGOTE_IMPORTS", "adaptor") == "adaptor":
        import mindspeed.megatron_adaptor  # noqa: F401
    import megatron.legacy.model
    import megatron.training  # noqa: F401

    gc.freeze()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        started = time.monotonic()
        codes = run_ranks(**run, inherited=answers.fileno())
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), file=answers, flush=True)


def run_ranks(
    script: str, argv: list[str], world: int, env: dict[str, str], log: str, seconds: float, inherited: int
) -> list[int]:
    """Fork the ranks and wait for all of them; when one fails or time is up, the others are ended."""
    port = free_port()
    children = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.close(inherited)
            os.setpgid(0, 0)  # whatever the rank starts goes with it
            become_rank(script, argv, rank, world, port, env, f"{log}.{rank}")
        with contextlib.suppress(OSError):  # the child does it too; whoever comes first
            os.setpgid(pid, pid)
        children[pid] = rank
    codes = [0] * world
    deadline = time.monotonic() + seconds
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > deadline:
                end(children)
            time.sleep(0.01)
            continue
        rank = children.pop(pid)
        codes[rank] = os.waitstatus_to_exitcode(status)
        end({pid: rank})
        if codes[rank] != 0:
            deadline = min(deadline, time.monotonic() + 3)
    return codes


def end(children: dict[int, int]) -> None:
    """Kill ranks that are still there, and processes that they left behind."""
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def become_rank(script: str, argv: list[str], rank: int, world: int, port: int, env: dict[str, str], log: str) -> None:
    """Never returns: run the script as `__main__` of a rank."""
    die_with_parent()  # a run that is interrupted must not leave ranks behind
    code = 1
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(env)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        sys.argv = [script, *argv]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
