"""Known answers of the communication counter on two and three ranks."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from mindspeed.testing import count_communication, ranks


@ranks(3)
def test_bytes_and_calls_of_every_collective(world):
    x = torch.ones(6, 2)  # 48 bytes
    third = torch.ones(2, 2)
    with count_communication() as counted:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.all_gather_into_tensor(torch.empty(18, 2), x)
        dist.all_gather([torch.empty(6, 2) for _ in range(3)], x)
        dist.reduce_scatter_tensor(torch.empty(2, 2), x)
        dist.reduce_scatter(torch.empty(2, 2), [third, third, third])
        dist.all_to_all_single(torch.empty(6, 2), x)
        dist.all_to_all([torch.empty(2, 2) for _ in range(3)], [third, third, third])
        dist.broadcast(x, src=1)
        dist.reduce(x, dst=0)
        dist.gather(third, [torch.empty(2, 2) for _ in range(3)] if world.rank == 0 else None, dst=0)
        dist.scatter(torch.empty(2, 2), [third, third, third] if world.rank == 2 else None, src=2)
        dist.barrier()
    found = {kind: (counted.calls(kind), counted.bytes(kind)) for kind in counted.kinds()}
    assert found == {
        "all_reduce": (2, 2 * 64),
        "all_gather": (2, 2 * 96),
        "reduce_scatter": (2, 2 * 32),
        "all_to_all": (2, 2 * 32),
        "broadcast": (1, 48 if world.rank == 1 else 0),
        "reduce": (1, 0 if world.rank == 0 else 48),
        "gather": (1, 0 if world.rank == 0 else 16),
        "scatter": (1, 32 if world.rank == 2 else 0),
        "barrier": (1, 0),
    }
    assert counted.views_agree()


@ranks(2)
def test_uneven_exchange_counts_what_leaves(world):
    rows = [1, 3] if world.rank == 0 else [2, 2]
    received = [[1, 2], [3, 2]][world.rank]
    x = torch.ones(4, 5)
    with count_communication() as counted:
        dist.all_to_all_single(torch.empty(sum(received), 5), x, received, rows)
    assert counted.bytes("all_to_all") == [3, 2][world.rank] * 20
    assert counted.views_agree()


@ranks(2)
def test_messages_and_functional_collectives(world):
    other = 1 - world.rank
    x, y = torch.ones(8), torch.empty(8)
    with count_communication() as counted:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, y, other)]):
            work.wait()
        functional.wait_tensor(functional.all_reduce(x, "sum", world.group))
    assert counted.kinds() == {"send": 1, "recv": 1, "all_reduce": 1}
    assert (counted.bytes("send"), counted.bytes("recv"), counted.bytes("all_reduce")) == (32, 0, 32)
    assert counted.calls() == 2, "a receive is the other side of a send"


class Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


@ranks(2)
def test_phases_and_groups_are_told_apart(world):
    pair = dist.new_group([0, 1])
    x = torch.ones(4, requires_grad=True)
    with count_communication() as counted:
        dist.all_reduce(torch.ones(2), group=pair)
        Reduced.apply(x).sum().backward()
    assert counted.calls("all_reduce", phase="forward") == counted.calls("all_reduce", phase="backward") == 1
    assert counted.bytes(group=pair) == 8 and counted.bytes(group=world.group) == 16
    assert [record.shapes for record in counted.records] == [((2,),), ((4,),)]


@ranks(2)
def test_other_threads_are_seen(world):
    with count_communication() as counted:
        thread = threading.Thread(target=dist.all_reduce, args=(torch.ones(4),))
        thread.start()
        thread.join()
    assert counted.calls("all_reduce") == 1 and counted.records[0].thread != counted.thread
    before = len(counted.records)
    dist.all_reduce(torch.ones(4))
    assert len(counted.records) == before, "nothing is counted outside of the block"


@ranks(2)
def test_torch_counts_the_same_calls(world):
    debug = pytest.importorskip("torch.distributed.tensor.debug")
    x = torch.ones(4)
    with debug.CommDebugMode() as theirs:
        dist.all_reduce(x)
        dist.broadcast(x, src=0)
    with count_communication() as ours:
        dist.all_reduce(x)
        dist.broadcast(x, src=0)
    assert theirs.get_total_counts() == ours.calls() == 2
