"""From a command line to a running job: arguments, features, ranks, groups, seeds; and back to nothing."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging as python_logging
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from mindspeed.errors import ConfigError, MindspeedError, Problem
from mindspeed.host.megatron_defaults import HostDefaults
from mindspeed.host.trainer import TrainerHost
from mindspeed.patching import activation
from mindspeed.patching.discovery import all_features
from mindspeed.patching.feature import Feature
from mindspeed.runtime import revert, start
from mindspeed.training import session as sessions
from mindspeed.training.arguments import ArgumentsProvider, check_config, parse_args
from mindspeed.training.launch import STORE_SOCKET
from mindspeed.training.session import Session
from mindspeed.training.tokenizers import build_tokenizer

_log = python_logging.getLogger(__name__)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def settle_arguments(
    extra_args_provider: ArgumentsProvider | None = None,
    args_defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
) -> TrainerHost:
    """Read, complete and check the command line, and apply the features it asks for. No process group exists yet.

    Args:
        args_defaults: values for arguments that are None after parsing.

    Raises:
        ConfigError: with all problems; torch and megatron-core are as before then.
    """
    args = parse_args(extra_args_provider, argv)
    for dest, value in (args_defaults or {}).items():
        if getattr(args, dest, None) is None:
            setattr(args, dest, value)
    host = TrainerHost(args)
    runtime = start(host, (HostDefaults(), *all_features()))
    try:
        active = runtime.settle(args, args.given_flags)
        changes = _validate(args, active, runtime.features)
        active = activation.check(runtime.features, args, platform=runtime.platform.name, given=args.given_flags)
        runtime.activate(active, announce=args.rank == 0)
        check_config(args)
    except BaseException:
        revert(force=True)
        raise
    if args.rank == 0:
        print(f"{runtime.platform.describe()}, world size {args.world_size}", flush=True)
        for line in changes:
            print(f"  {line}", flush=True)
    return host


def _validate(args: argparse.Namespace, active: list[activation.Active], features: Iterable[Feature]) -> list[str]:
    """Derive and check the trainer's own arguments while features hide what it must not see."""
    from mindspeed.training import derive, validation

    with activation.overridden(args, active):
        wrong = validation.out_of_range(args)
        if not validation.has_ranks(args):
            raise ConfigError(wrong)
        changes = derive.derive(args)
        problems = validation.problems(args, wrong)
    if problems and not validation.is_complete(args):
        raise ConfigError(problems)
    if problems:  # the features' problems belong into the same report
        activation.check(features, args, given=args.given_flags, more=problems)
    return changes


def initialize(
    extra_args_provider: ArgumentsProvider | None = None,
    args_defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
) -> Session:
    """Everything that precedes the model; opens the session of this process.

    Raises:
        ConfigError: the arguments, alone or between ranks, cannot be honoured.
        MindspeedError: the ranks cannot meet.
    """
    from megatron.core.timers import Timers

    from mindspeed.training import data

    begun = time.time()
    host = settle_arguments(extra_args_provider, args_defaults, argv)
    args = host.args
    if args.logging_level is not None:
        python_logging.getLogger().setLevel(args.logging_level)
    session = sessions.begin(Session(args=args, events=host.events, begun=begun))
    session.notes["data_files"] = data.check_files(args)
    session.timers = Timers(args.timing_log_level, args.timing_log_option)
    session.tokenizer = build_tokenizer(args)
    _meet(args, session)
    _model_parallel(args)
    host.events.fire("groups_created")
    _seed(args)
    _rerun_machine(args)
    _open_writer(args, session)
    session.begun = _earliest(begun)
    return session


def _meet(args: argparse.Namespace, session: Session) -> None:
    """Connect the ranks and make sure that they were started alike."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    if torch.distributed.is_initialized():
        _agree_in_group(args)
    else:
        session.notes["owns_process_group"] = True
        torch.cuda.set_device(args.local_rank)
        store = _store(args)
        _agree(args, store)
        torch.distributed.init_process_group(
            backend=args.distributed_backend,
            store=torch.distributed.PrefixStore("default", store),
            world_size=args.world_size,
            rank=args.rank,
            timeout=timedelta(minutes=args.distributed_timeout_minutes),
        )
    init_num_microbatches_calculator(
        args.rank,
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
    )


def _store(args: argparse.Namespace) -> Any:
    """Key-value store of the job; within the process when there is one rank."""
    if args.world_size == 1:
        return torch.distributed.HashStore()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        rule = "MASTER_ADDR and MASTER_PORT are not set"
        raise ConfigError(
            [Problem("WORLD_SIZE", args.world_size, rule, "start with `mindspeed pretrain --nproc N` or torchrun")]
        )
    if address in _LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    waiting = timedelta(minutes=args.distributed_timeout_minutes)
    try:
        return torch.distributed.TCPStore(
            address,
            int(port),
            args.world_size,
            is_master=_serves(args),
            timeout=waiting,
            wait_for_workers=False,
            **_listening(),
        )
    except (RuntimeError, ValueError) as error:
        why = "the port is in use" if "EADDRINUSE" in str(error) or "in use" in str(error) else str(error).splitlines()[0]
        raise MindspeedError(
            f"rank {args.rank} cannot meet the others at {address}:{port}: {why}. Choose another MASTER_PORT."
        ) from error


def _listening() -> dict[str, Any]:
    """The launcher's reserved socket where there is one; otherwise the store may share a port with other stores."""
    descriptor = os.environ.get(STORE_SOCKET)
    return {"multi_tenant": True} if descriptor is None else {"master_listen_fd": int(descriptor)}


def _serves(args: argparse.Namespace) -> bool:
    """Whether this process runs the store; torchrun's agent may do so itself."""
    return args.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _facts(args: argparse.Namespace) -> dict[str, str]:
    """What must be equal on all ranks, as text."""
    from importlib import metadata

    own = ("rank", "local_rank", "mindspeed", "given_flags")
    facts = {name: repr(value) for name, value in vars(args).items() if name not in own}
    for package in ("mindspeed", "torch", "megatron-core"):
        facts[f"version of {package}"] = metadata.version(package)
    return facts


def _agree(args: argparse.Namespace, store: Any) -> None:
    """Compare arguments through the store, before any process group exists.

    Raises:
        ConfigError: on all ranks; names each differing flag with both values.
    """
    if args.world_size == 1:
        return
    mine = json.dumps(_facts(args), sort_keys=True)
    store.set(f"mindspeed/arguments/{args.rank}", mine)
    if args.rank == 0:
        reference = hashlib.blake2b(mine.encode()).digest()
        verdict: list[tuple[str, str]] = []
        for rank in range(1, args.world_size):
            theirs = _wait(store, f"mindspeed/arguments/{rank}", f"rank {rank} did not start")
            if hashlib.blake2b(theirs).digest() != reference:
                verdict += _differences(rank, json.loads(mine), json.loads(theirs))
        store.set("mindspeed/verdict", json.dumps(verdict))
    verdict = json.loads(_wait(store, "mindspeed/verdict", "rank 0 did not answer"))
    if verdict:
        raise ConfigError(_disagreement(verdict))


def _wait(store: Any, key: str, complaint: str) -> bytes:
    try:
        return bytes(store.get(key))
    except Exception as error:  # torch's store errors share no public base
        raise MindspeedError(f"{complaint} within the time of --distributed-timeout-minutes ({error})") from error


def _agree_in_group(args: argparse.Namespace) -> None:
    """The same for ranks whose process group the program made."""
    args.rank, args.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    everyone: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(everyone, _facts(args))
    verdict = [item for rank, facts in enumerate(everyone) for item in _differences(rank, everyone[0], facts)]
    if verdict:
        raise ConfigError(_disagreement(verdict))


def _differences(rank: int, first: dict[str, str], other: dict[str, str]) -> list[tuple[str, str]]:
    names = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
    return [(name, f"rank 0 has {first.get(name)}, rank {rank} has {other.get(name)}") for name in names]


def _disagreement(verdict: Sequence[Sequence[str]]) -> list[Problem]:
    # a flag and what is derived from it differ together; what the user gave comes first
    problems = []
    for name, text in verdict[:20]:
        flag = name if name.startswith("version") else "--" + name.replace("_", "-")
        problems.append(
            Problem(flag, None, f"differs between ranks: {text}", "start all ranks with the same command and packages")
        )
    return problems


def _model_parallel(args: argparse.Namespace) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=args.enable_gloo_process_groups,
    )


def _seed(args: argparse.Namespace) -> None:
    """Seed all generators; pipeline stages differ, data-parallel replicas only when asked to."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    if args.data_parallel_random_init:
        seed += 10 * parallel_state.get_data_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if args.num_experts is not None:
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=torch.cuda.current_device()))
    if args.deterministic_mode:
        torch.use_deterministic_algorithms(True)


def _rerun_machine(args: argparse.Namespace) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.rerun_state_machine import RerunDiagnostic, RerunErrorInjector, RerunMode, initialize_rerun_state_machine

    def save() -> dict[str, Any]:
        return {"rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states()}

    def restore(state: dict[str, Any]) -> None:
        if state["rng_tracker_states"]:
            tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])

    initialize_rerun_state_machine(
        state_save_func=save,
        state_restore_func=restore,
        mode=RerunMode(args.rerun_mode),
        error_injector=RerunErrorInjector(
            error_injection_rate=args.error_injection_rate, error_injection_type=RerunDiagnostic(args.error_injection_type)
        ),
        result_rejected_tracker_filename=args.result_rejected_tracker_filename,
    )


def _open_writer(args: argparse.Namespace, session: Session) -> None:
    """TensorBoard on the last rank."""
    if not args.tensorboard_dir or args.rank != args.world_size - 1:
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        _log.warning("--tensorboard-dir: nothing is written, because the package is missing: pip install tensorboard")
        return
    session.writer = SummaryWriter(log_dir=args.tensorboard_dir, max_queue=args.tensorboard_queue_size)


def _earliest(begun: float) -> float:
    """Start of the earliest rank, from which `--exit-duration-in-mins` counts."""
    moment = torch.tensor([begun], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(moment, torch.distributed.ReduceOp.MIN)
    return float(moment.item())


def shut_down() -> None:
    """Close what `initialize` opened, and undo every patch; harmless when nothing is open."""
    if not sessions.is_open():
        revert(force=True)
        return
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine

    session = sessions.current()
    if session.progress is not None:
        session.progress.close()
    if session.writer is not None:
        session.writer.close()
    if session.lock is not None:
        session.lock.release()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    _forget_groups(parallel_state)
    session.events.fire("groups_destroyed")
    if session.notes.get("owns_process_group") and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sessions.end()
    revert(force=True)


def _forget_groups(parallel_state: Any) -> None:
    """Destroy megatron-core's groups with the lists of ranks that its own function leaves behind."""
    parallel_state.destroy_model_parallel()
    for name in [name for name in vars(parallel_state) if name.endswith("_GLOBAL_RANKS")]:
        setattr(parallel_state, name, None)  # a rank outside the next job's group would take itself for a member
