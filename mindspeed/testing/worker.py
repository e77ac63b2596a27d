"""One rank of the pool: runs test bodies that the pool names, and cleans up between them."""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from mindspeed.testing.world import World
from mindspeed.testing.zygote import receive, send

SEED = 1234


@dataclass(frozen=True)
class Task:
    """A test body by name, with its values and what the pool wants to hold while it runs."""

    module: str
    file: str
    qualname: str
    values: bytes  # pickled (args, kwargs): their classes may live in the module that is to be loaded first
    shared_dir: str
    python_path: tuple[str, ...]
    nan_uninitialised: bool
    generation: int  # counts re-creations of the default process group


@dataclass(frozen=True)
class Outcome:
    """What became of a task on one rank; `error` is pickled apart since foreign exceptions may not survive it."""

    value: Any = None
    failed: bool = False
    skipped: str = ""
    summary: str = ""
    trace: str = ""
    group_intact: bool = True


@dataclass
class _Snapshot:
    """Process-wide state that a test body may change and the next one must not see."""

    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    argv: list[str] = field(default_factory=lambda: list(sys.argv))
    directory: str = field(default_factory=os.getcwd)
    handlers: dict[int, Any] = field(
        default_factory=lambda: {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    )

    def restore(self) -> None:
        os.environ.clear()
        os.environ.update(self.environ)
        sys.argv[:] = self.argv
        os.chdir(self.directory)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def serve(channel: socket.socket, rank: int, size: int, directory: str) -> None:
    """Run tasks until the pool closes the channel."""
    output = os.open(os.path.join(directory, f"rank{rank}.out"), os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    stacks = open(os.path.join(directory, f"rank{rank}.stacks"), "w")  # faulthandler needs it open for good
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    snapshot = _Snapshot()
    while True:
        try:
            task, _ = receive(channel)
        except EOFError:
            return
        if task == "clean":
            clean(snapshot)
            continue
        _send_outcome(channel, run(task, rank, size, directory))


def _send_outcome(channel: socket.socket, outcome: Outcome) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        send(channel, outcome)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        why = f"the returned value cannot be sent back: {error}"
        send(channel, Outcome(failed=True, summary=why, trace=why))


def run(task: Task, rank: int, size: int, directory: str) -> Outcome:
    """Run one test body; whatever it raises becomes part of the outcome."""
    try:
        connect(rank, size, directory, task.generation)
        torch.manual_seed(SEED)
        torch.use_deterministic_algorithms(task.nan_uninitialised, warn_only=True)
        sys.path[:] = task.python_path
        body = resolve(task)
        args, kwargs = pickle.loads(task.values)
        value = body(World(rank, size, Path(task.shared_dir)), *args, **kwargs)
        return Outcome(value=value, group_intact=_group_intact(size))
    except BaseException as error:  # pytest's own outcomes derive from BaseException
        if type(error).__name__ == "Skipped":
            return Outcome(skipped=str(error) or "skipped without a reason", group_intact=_group_intact(size))
        lines = traceback.TracebackException.from_exception(error)
        lines.stack = traceback.StackSummary.from_list([f for f in lines.stack if f.filename != __file__])
        return Outcome(failed=True, summary="".join(lines.format_exception_only()).strip(), trace="".join(lines.format()))


def connect(rank: int, size: int, directory: str, generation: int) -> None:
    """Make the default process group of this generation unless it is there already."""
    if dist.is_initialized():
        return
    port_file = Path(directory, f"port{generation}")
    timeout = timedelta(seconds=600)  # the pool's own time limit comes first
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
        port_file.with_suffix(".tmp").write_text(str(store.port))
        port_file.with_suffix(".tmp").rename(port_file)
    else:
        while not port_file.exists():
            time.sleep(0.002)
        store = dist.TCPStore("127.0.0.1", int(port_file.read_text()), size, is_master=False, timeout=timeout)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def _group_intact(size: int) -> bool:
    return dist.is_initialized() and dist.get_backend() == "gloo" and dist.get_world_size() == size


def resolve(task: Task) -> Callable[..., Any]:
    """The body that a task names: imported by name, or from its file if the name leads elsewhere."""
    found: Any = _load_module(task.module, task.file)
    owner: Any = None
    for part in task.qualname.split("."):
        owner, found = found, getattr(found, part)
    body = getattr(found, "__rank_body__", found)
    if isinstance(owner, type) and not isinstance(owner.__dict__[task.qualname.rpartition(".")[2]], staticmethod):
        instance = owner()
        return lambda world, *args, **kwargs: body(instance, world, *args, **kwargs)
    return body


def _load_module(name: str, file: str) -> ModuleType:
    known = sys.modules.get(name)
    if known is not None and _same_file(known, file):
        return known
    if not Path(file).name.startswith("test_"):
        module = importlib.import_module(name)
        if _same_file(module, file):
            return module
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise ImportError(f"cannot load {name} from {file}")
    module = importlib.util.module_from_spec(spec)
    package, _, own_name = name.rpartition(".")
    if package:
        with contextlib.suppress(ImportError):  # a name that pytest made from a path outside of the project
            setattr(importlib.import_module(package), own_name, module)
    sys.modules[name] = module
    try:
        exec(_compile_with_readable_asserts(file), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _same_file(module: ModuleType, file: str) -> bool:
    return os.path.realpath(getattr(module, "__file__", None) or "") == os.path.realpath(file)


def _compile_with_readable_asserts(file: str) -> Any:
    """Compile a test file as pytest does, so that a failed assert shows its operands."""
    source = Path(file).read_bytes()
    tree = ast.parse(source, filename=file)
    with contextlib.suppress(ImportError):
        from _pytest.assertion.rewrite import rewrite_asserts

        rewrite_asserts(tree, source, file)
    return compile(tree, file, "exec", dont_inherit=True)


def clean(snapshot: _Snapshot) -> None:
    """Bring the process back to what a test may expect at its start; the default process group is kept."""
    _revert_patches()
    had_groups = _drop_megatron_state()
    had_groups |= _drop_groups()
    snapshot.restore()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    os.ftruncate(1, 0)
    if had_groups:
        gc.collect()  # gloo keeps three threads a group until its last reference is gone


def _revert_patches() -> None:
    import mindspeed

    revert = getattr(mindspeed, "revert", None)
    if "mindspeed.runtime" in sys.modules and revert is not None:
        revert()


def _drop_megatron_state() -> bool:
    """Forget the groups, random states and counters that megatron keeps in module globals."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None:
        return False
    had_groups = bool(parallel_state.is_initialized())
    parallel_state.destroy_model_parallel()
    for name in [name for name in vars(parallel_state) if name.endswith("_GLOBAL_RANKS")]:
        setattr(parallel_state, name, None)  # its own function leaves these behind
    if calculator := sys.modules.get("megatron.core.num_microbatches_calculator"):
        calculator.destroy_num_microbatches_calculator()
    if rerun := sys.modules.get("megatron.core.rerun_state_machine"):
        rerun.destroy_rerun_state_machine()
    if random := sys.modules.get("megatron.core.tensor_parallel.random"):
        random._CUDA_RNG_STATE_TRACKER = None
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    if global_vars := sys.modules.get("megatron.training.global_vars"):
        global_vars.destroy_global_vars()
    return had_groups


def _drop_groups() -> bool:
    """Destroy every process group but the default one."""
    if not dist.is_initialized():
        return False
    default = dist.group.WORLD
    extra = [group for group in dist.distributed_c10d._world.pg_map if group is not default]
    for group in extra:
        with contextlib.suppress(ValueError):  # destroyed together with another one
            dist.destroy_process_group(group)
    return bool(extra)
