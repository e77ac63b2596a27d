"""What this machine can do at best, measured at the start of every run."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._case import Floor
from benchmarks._measure import FloorClock, matmul_rate
from mindspeed.testing.pool import pools

COPY_BYTES = 256 << 20
MESSAGE_BYTES = 16 << 20


def measure_ceilings(device: str) -> dict[str, Any]:
    """Copy and message bandwidth in GB/s, matmul rates in TFLOP/s, and how late a sleeper wakes in ms."""
    clock = "cpu" if device == "cpu" else "device"
    (ceilings,) = pools().get(1).run(_on_one, device, clock)
    if device == "cpu":
        ceilings["p2p_GBps"] = min(pools().get(2).run(_message_rate))
    return ceilings


def _on_one(world: Any, device: str, clock: str) -> dict[str, Any]:
    floor = FloorClock(Floor(bytes=COPY_BYTES), device, clock)
    seconds = min(floor.seconds() for _ in range(5))
    rates = {name: matmul_rate(dtype, device, clock) / 1e12 for name, dtype in _DTYPES.items()}
    return {"copy_GBps": COPY_BYTES / seconds / 1e9, "matmul_TFLOPs": rates, "sleep_jitter_ms": _sleep_jitter()}


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _sleep_jitter() -> float:
    late = []
    for _ in range(20):
        start = time.perf_counter()
        time.sleep(0.005)
        late.append(time.perf_counter() - start - 0.005)
    return sorted(late)[-2] * 1e3  # the worst one belongs to somebody else's burst


def _message_rate(world: Any) -> float:
    message = torch.zeros(MESSAGE_BYTES, dtype=torch.int8)
    best = float("inf")
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        if world.rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        else:
            dist.recv(message, 0)
            dist.send(message, 0)
        best = min(best, time.perf_counter() - start)
    return 2 * MESSAGE_BYTES / best / 1e9
