"""Programs that ask for nccl get gloo on a CPU, meshes of cuda become meshes of CPUs."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from mindspeed.platform.cpu_shims.distributed import gloo_for, use_loopback
from mindspeed.testing import ranks
from tests.platform._activated import cpu_activated


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("nccl", "gloo"),
        ("NCCL", "gloo"),
        ("hccl", "gloo"),
        ("gloo", "gloo"),
        ("cuda:nccl", "gloo"),
        ("cpu:gloo,cuda:nccl", "gloo"),
        ("npu:hccl,cpu:gloo", "gloo"),
        ("cpu:gloo,cuda:mpi", "gloo"),
        ("cpu:mpi", "cpu:mpi"),
        ("mpi", "mpi"),
        ("ucc", "ucc"),
    ],
)
def test_backends(asked, given):
    assert gloo_for(asked) == given


@pytest.mark.parametrize(
    ("address", "init_method", "expected"),
    [
        ("127.0.0.1", None, True),
        ("localhost", None, True),
        ("::1", None, True),
        ("node7.cluster", None, False),
        ("10.1.2.3", None, False),
        ("10.1.2.3", "tcp://localhost:29500", True),
        ("127.0.0.1", "tcp://10.1.2.3:29500", False),
    ],
)
def test_loopback_is_used_when_all_ranks_are_here(monkeypatch, address, init_method, expected):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "to be removed")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    use_loopback(init_method)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == ("lo" if expected else None)


def test_a_chosen_interface_stays(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    use_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth9"


@ranks(2)
def test_groups_of_nccl_are_groups_of_gloo(world):
    with cpu_activated():
        options = object()  # as ProcessGroupNCCL.Options, which a CPU build does not have
        for group in (
            dist.new_group([0, 1], backend="nccl", pg_options=options),
            dist.new_group([0, 1], None, "cuda:nccl", options),
            dist.new_group([0, 1]),
        ):
            assert dist.get_backend(group) == "gloo"
            x = torch.ones(3, device="cuda")
            dist.all_reduce(x, group=group)
            assert x.tolist() == [2, 2, 2]


@ranks(2)
def test_meshes_of_cuda_are_meshes_of_cpus(world):
    with cpu_activated():
        mesh = dist.init_device_mesh("cuda", (2,), mesh_dim_names=("dp",))
        assert mesh.device_type == "cpu" and mesh.size() == 2
        again = dist.device_mesh.DeviceMesh.from_group(world.group, "cuda")
        assert again.device_type == "cpu" and dist.get_backend(mesh.get_group()) == "gloo"


def test_init_process_group_without_a_backend_but_with_a_device(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with cpu_activated():
        dist.init_process_group(
            backend=None, store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0), pg_options=object()
        )
        try:
            assert dist.get_backend() == "gloo"
            x = torch.full((4,), 3.0, dtype=torch.bfloat16)
            dist.all_reduce(x, op=dist.ReduceOp.AVG)
            dist.all_reduce(x.view(2, 2).t(), op=dist.ReduceOp.MAX)
            assert x.tolist() == [3.0] * 4
        finally:
            dist.destroy_process_group()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
