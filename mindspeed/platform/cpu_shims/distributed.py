"""torch.distributed on a CPU: gloo in the place of nccl, with its gaps closed by `mindspeed.platform.collectives`."""

from __future__ import annotations

import functools
import inspect
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.distributed.device_mesh

from mindspeed.patching.patch import Patch
from mindspeed.platform import collectives
from mindspeed.platform.cpu_shims._places import everywhere, method
from mindspeed.platform.cpu_shims.devices import on_cpu
from mindspeed.platform.scope import mark, original_of

logger = logging.getLogger(__name__)

_DEFINED_IN = "torch.distributed.distributed_c10d"
_BOTH = ("torch.distributed", _DEFINED_IN)
_NATIVE = (
    "all_reduce reduce reduce_scatter reduce_scatter_tensor all_gather all_to_all all_to_all_single all_gather_into_tensor"
).split()
# Newer torch warns at each call of the old name.
_NEW_NAMES = {"all_gather_into_tensor": "all_gather_single", "reduce_scatter_tensor": "reduce_scatter_single"}


def patches() -> Iterator[Patch]:
    """Backends, device meshes, and the collectives that gloo does not offer as nccl does."""
    if not dist.is_available():
        return
    for name in ("init_process_group", "new_group"):
        yield from everywhere(name, _with_gloo, *_BOTH, reason="gloo serves CPUs")
    yield from everywhere(
        "init_device_mesh", _mesh_of_cpus, "torch.distributed", "torch.distributed.device_mesh", reason="gloo serves CPUs"
    )
    mesh = torch.distributed.device_mesh.DeviceMesh
    yield method(mesh, "torch.distributed.device_mesh:DeviceMesh.__init__", _mesh_of_cpus, reason="gloo serves CPUs")
    # P2POp compares functions by identity, with the name in the module that defines it.
    yield from everywhere("isend", _like(collectives.sending_alive), *_BOTH, reason="gloo reads the tensor after the call")
    yield from _collectives()


def _collectives() -> Iterator[Patch]:
    native = {name: original_of(getattr(dist, _NEW_NAMES.get(name, name), None) or getattr(dist, name)) for name in _NATIVE}
    reductions = collectives.Reductions(native)
    exchange = native["all_to_all_single"]
    ours: dict[str, Any] = {
        "all_reduce": reductions.all_reduce,
        "reduce": reductions.reduce,
        "reduce_scatter": reductions.reduce_scatter,
        "reduce_scatter_tensor": reductions.reduce_scatter_tensor,
        "reduce_scatter_single": reductions.reduce_scatter_tensor,
        "_reduce_scatter_base": reductions.reduce_scatter_tensor,
        "all_gather": collectives.gathering_uneven(native["all_gather"], exchange),
        "all_to_all": collectives.exchanging_uneven(native["all_to_all"], exchange),
        "all_to_all_single": collectives.exchanging_any_layout(exchange),
        "all_gather_into_tensor": collectives.gathering_any_layout(native["all_gather_into_tensor"]),
        "all_gather_single": collectives.gathering_any_layout(native["all_gather_into_tensor"]),
        "_all_gather_base": collectives.gathering_any_layout(native["all_gather_into_tensor"]),
        "_coalescing_manager": reductions.coalescing(original_of(vars(dist)["_coalescing_manager"])),
    }
    for name, function in ours.items():
        make = functools.partial(_dressed, function)
        yield from everywhere(name, make, "torch.distributed", reason="closes a gap of gloo exactly")


def _dressed(function: Callable[..., Any], original: Callable[..., Any]) -> Any:
    """`function` with the looks of `original`; a plain function, so that it can say what it stands for."""

    @functools.wraps(original)
    def shim(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    return mark(shim, original)


def _like(make: Callable[[Any], Callable[..., Any]]) -> Callable[[Any], Any]:
    return lambda original: _dressed(make(original), original)


def _with_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    """init_process_group and new_group, with the arguments that speak of CUDA brought to the CPU."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        given = bound.arguments
        is_first = original.__name__ == "init_process_group"
        backend = given.get("backend")
        if backend is None and is_first:
            backend = given["backend"] = "gloo"  # torch's default includes nccl where it is built in
        if backend is not None and (ours := gloo_for(str(backend))) != str(backend):
            logger.info("process group backend %s -> %s on platform cpu", backend, ours)
            given["backend"] = ours
            given.pop("pg_options", None)
        if "device_id" in given:
            given.pop("device_id")  # binds a group to one accelerator
        if is_first:
            use_loopback(given.get("init_method"))
        return original(*bound.args, **bound.kwargs)

    created: Callable[..., Any] = mark(create, original)
    return created


def gloo_for(backend: str) -> str:
    """The backend for CPUs that stands for `backend`: "nccl" and "cuda:nccl,cpu:gloo" become "gloo"."""
    chosen: dict[str, str] = {}
    for item in backend.lower().split(","):
        device, _, name = item.rpartition(":")
        device = "cpu" if device in ("cuda", "npu") else device
        chosen.setdefault(device, "gloo" if name in ("nccl", "hccl", "xccl") else name)
    if chosen == {"cpu": "gloo"}:
        return "gloo"
    return ",".join(f"{device}:{name}" if device else name for device, name in chosen.items())


def use_loopback(init_method: str | None = None) -> None:
    """Let gloo use the loopback interface when all ranks are on this machine; machines without a network resolve no name."""
    address = urlparse(init_method or "").hostname or os.environ.get("MASTER_ADDR", "")
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(address):
        return
    names = {name for _, name in socket.if_nameindex()}
    for loopback in ("lo", "lo0"):
        if loopback in names:
            os.environ["GLOO_SOCKET_IFNAME"] = loopback
            return


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _mesh_of_cpus(original: Callable[..., Any]) -> Callable[..., Any]:
    """A device mesh of "cuda" is one of CPUs."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.arguments["device_type"] = on_cpu(bound.arguments["device_type"])
        return original(*bound.args, **bound.kwargs)

    created: Callable[..., Any] = mark(create, original)
    return created
