"""Host flags that a plain CPU cannot honour, as data: flag, when it counts as used, why not, what to do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mindspeed.errors import Problem


def _switched_on(value: Any) -> bool:
    return bool(value)


def _says(text: str) -> Callable[[Any], bool]:
    return lambda value: value == text


@dataclass(frozen=True)
class Refusal:
    """One flag that platform cpu refuses when `used(value)` holds."""

    option: str
    dest: str
    rule: str
    fix: str
    used: Callable[[Any], bool] = _switched_on
    only_given: bool = False  # the host's own default does not count as a wish


_REMOVE = "remove the flag, or run on a CUDA or NPU device"
_NEEDS_FP8 = "needs 8-bit matrix units, which platform cpu lacks"
_NEEDS_GRAPHS = "captures a device graph, which platform cpu lacks"
_NEEDS_DEVICE_MEMORY = "moves tensors between device and host memory, which are the same on platform cpu"
_NEEDS_NCCL = "tunes NCCL, and platform cpu communicates through gloo"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("--fp8-format", "fp8", _NEEDS_FP8, "train with --bf16 or in fp32"),
    Refusal("--fp8-param-gather", "fp8_param_gather", _NEEDS_FP8, _REMOVE),
    Refusal("--enable-cuda-graph", "enable_cuda_graph", _NEEDS_GRAPHS, _REMOVE),
    Refusal("--external-cuda-graph", "external_cuda_graph", _NEEDS_GRAPHS, _REMOVE),
    Refusal(
        "--transformer-impl",
        "transformer_impl",
        "Transformer Engine needs a CUDA device",
        "use --transformer-impl local",
        used=_says("transformer_engine"),
        only_given=True,
    ),
    Refusal("--tp-comm-overlap", "tp_comm_overlap", "is Transformer Engine's overlap and needs a CUDA device", _REMOVE),
    Refusal("--use-sharp", "use_sharp", "needs an InfiniBand switch that NCCL drives", _REMOVE),
    Refusal("--nccl-communicator-config-path", "nccl_communicator_config_path", _NEEDS_NCCL, _REMOVE),
    Refusal("--nccl-ub", "nccl_ub", _NEEDS_NCCL, _REMOVE),
    Refusal("--distributed-backend", "distributed_backend", "is not built into torch for CPUs", "use gloo", used=_says("ucc")),
    Refusal("--optimizer-cpu-offload", "optimizer_cpu_offload", _NEEDS_DEVICE_MEMORY, _REMOVE),
    Refusal("--cpu-offloading", "cpu_offloading", _NEEDS_DEVICE_MEMORY, _REMOVE),
    Refusal("--cpu-offloading-num-layers", "cpu_offloading_num_layers", _NEEDS_DEVICE_MEMORY, _REMOVE),
    Refusal("--record-memory-history", "record_memory_history", "reads the CUDA caching allocator", _REMOVE),
    Refusal(
        "--moe-token-dispatcher-type",
        "moe_token_dispatcher_type",
        "is DeepEP, which needs NVLink and a CUDA device",
        "use alltoall or allgather",
        used=_says("flex"),
    ),
    Refusal("--moe-enable-deepep", "moe_enable_deepep", "needs NVLink and a CUDA device", _REMOVE),
    Refusal("--flash-decode", "flash_decode", "is an inference kernel of flash-attn and needs a CUDA device", _REMOVE),
    Refusal(
        "--inference-dynamic-batching",
        "inference_dynamic_batching",
        "belongs to the inference server, which platform cpu does not run",
        _REMOVE,
    ),
)


def refused_on_cpu(args: argparse.Namespace, given: frozenset[str] = frozenset()) -> Iterator[Problem]:
    """Everything in `args` that platform cpu cannot honour.

    Args:
        args: the host's parsed arguments; names that this host lacks are skipped.
        given: destinations that the user set explicitly; needed only where the host's default is a refused value.
    """
    for refusal in REFUSALS:
        value = getattr(args, refusal.dest, None)
        if value is None or not refusal.used(value) or (refusal.only_given and refusal.dest not in given):
            continue
        yield Problem(refusal.option, value, refusal.rule, refusal.fix)
    if getattr(args, "profile", False) and not getattr(args, "use_pytorch_profiler", False):
        yield Problem(
            "--profile",
            True,
            "drives the CUDA profiler of nsys when --use-pytorch-profiler is absent, and platform cpu has none",
            "add --use-pytorch-profiler",
        )
