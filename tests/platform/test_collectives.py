"""What gloo lacks is closed exactly; every test compares with a result computed by hand on one process."""

import contextlib
import time

import pytest
import torch
import torch.distributed as dist

from mindspeed.errors import PlatformError
from mindspeed.platform.collectives import all_gather_uneven, op_name, reduce_scatter_uneven
from mindspeed.platform.op_probe import OpProbe
from mindspeed.testing import ranks
from tests.platform._activated import cpu_activated

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def addends(size, dtype=torch.bfloat16, length=64):
    """256 + 1 + 1 + 1: exact in fp32, 256 or 260 when bf16 rounds at every hop."""
    return [torch.full((length,), 256.0 if rank == 0 else 1.0, dtype=dtype) for rank in range(size)]


def rounded_once(parts):
    return torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype)


@ranks(4)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("async_op", [False, True])
def test_16_bit_sums_round_once(world, dtype, async_op):
    parts = addends(world.size, dtype)
    right = rounded_once(parts)
    with cpu_activated():
        tensor = parts[world.rank].clone()
        handle = dist.all_reduce(tensor, async_op=async_op)
        assert (handle is not None) == async_op
        if async_op:
            handle.wait()
            assert handle.is_completed()
        assert torch.equal(tensor, right)

        shard = torch.empty(16, dtype=dtype)
        handle = dist.reduce_scatter_tensor(shard, parts[world.rank], async_op=async_op)
        if async_op:
            handle.wait()
        assert torch.equal(shard, right[:16])

        sizes = [1, 0, 60, 3]
        uneven = torch.empty(sizes[world.rank], dtype=dtype)
        handle = dist.reduce_scatter(uneven, list(parts[world.rank].split(sizes)), async_op=async_op)
        if async_op:
            handle.wait()
        assert torch.equal(uneven, right.split(sizes)[world.rank])

        tensor = parts[world.rank].clone()
        handle = dist.reduce(tensor, dst=2, async_op=async_op)
        if async_op:
            handle.wait()
        assert torch.equal(tensor, right if world.rank == 2 else parts[world.rank])


@ranks(4)
def test_gloo_alone_rounds_16_bit_sums_at_every_hop(world):
    """The reason for the emulation; if a new gloo sums exactly, the emulation can go."""
    tensor = addends(world.size)[world.rank].clone()
    dist.all_reduce(tensor)
    wrong = torch.tensor([not torch.equal(tensor, rounded_once(addends(world.size)))]).int()
    dist.all_reduce(wrong)
    assert wrong.item() > 0


@ranks(2)
def test_dropped_handles_still_deliver(world):
    parts = addends(world.size)
    with cpu_activated():
        tensor = parts[world.rank].clone()
        dist.all_reduce(tensor, async_op=True)
        deadline = time.monotonic() + 20
        right = rounded_once(parts)
        while not torch.equal(tensor, right):
            assert time.monotonic() < deadline, "the result never arrived"
            time.sleep(0.005)
        world.barrier()


@ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_and_maximum(world, dtype):
    mine = torch.arange(8, dtype=dtype) + 10 * world.rank
    parts = [torch.arange(8, dtype=dtype), torch.arange(8, dtype=dtype) + 10]
    mean, top = (parts[0].float() + parts[1].float()).div(2).to(dtype), torch.maximum(*parts)
    half = slice(4 * world.rank, 4 * world.rank + 4)
    with cpu_activated():
        for op, right in ((dist.ReduceOp.AVG, mean), (dist.ReduceOp.MAX, top)):
            tensor = mine.clone()
            dist.all_reduce(tensor, op=op)
            assert torch.equal(tensor, right), op
            shard = torch.empty(4, dtype=dtype)
            dist.reduce_scatter_tensor(shard, mine, op=op)
            assert torch.equal(shard, right[half]), op
            shard = torch.empty(4, dtype=dtype)
            dist.reduce_scatter(shard, list(mine.split(4)), op=op)
            assert torch.equal(shard, right[half]), op


@ranks(2)
@pytest.mark.parametrize("async_ops", [False, True])
def test_coalesced_reductions(world, async_ops):
    parts = addends(world.size)
    right = rounded_once(parts)
    with cpu_activated():
        narrow, wide, mean = parts[world.rank].clone(), torch.full((4,), 2.0), torch.full((4,), float(world.rank))
        with dist._coalescing_manager(async_ops=async_ops) as works:
            dist.all_reduce(narrow, async_op=async_ops)
            dist.all_reduce(wide, async_op=async_ops)
            dist.all_reduce(mean, op=dist.ReduceOp.AVG, async_op=async_ops)
        if async_ops:
            works.wait()
        assert torch.equal(narrow, right)
        assert torch.equal(wide, torch.full((4,), 4.0))
        assert torch.equal(mean, torch.full((4,), 0.5))

        shard = torch.empty(32, dtype=torch.bfloat16)
        with dist._coalescing_manager(async_ops=async_ops) as works:
            dist.reduce_scatter_tensor(shard, parts[world.rank], async_op=async_ops)
        if async_ops:
            works.wait()
        assert torch.equal(shard, right[:32])


@ranks(2)
def test_any_layout(world):
    table = torch.arange(12.0).reshape(3, 4) + 100 * world.rank
    both = torch.arange(12.0).reshape(3, 4) * 2 + 100
    with cpu_activated():
        turned = table.t().clone(memory_format=torch.contiguous_format).t()  # [3, 4] stored by columns
        dist.all_reduce(turned)
        assert torch.equal(turned, both)
        wide = torch.zeros(3, 8)
        wide[:, ::2] = table
        dist.all_reduce(wide[:, ::2])
        assert torch.equal(wide[:, ::2], both) and not wide[:, 1::2].any()
        gathered = torch.empty(8, 3)
        dist.all_gather_into_tensor(gathered, table.t())
        assert torch.equal(gathered, torch.cat([torch.arange(12.0).reshape(3, 4).t() + 100 * rank for rank in range(2)]))
        exchanged = torch.empty(4, 3)
        dist.all_to_all_single(exchanged, table.t(), torch.tensor([2, 2]), torch.tensor([2, 2]))
        rows = torch.arange(12.0).reshape(3, 4).t()[2 * world.rank : 2 * world.rank + 2]
        assert torch.equal(exchanged, torch.cat([rows, rows + 100]))


@ranks(4)
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [2, 2, 2, 2]])
@pytest.mark.parametrize("async_op", [False, True])
def test_lists_of_unequal_length(world, sizes, async_op):
    everything = torch.arange(2.0 * sum(sizes)).reshape(-1, 2)
    parts = everything.split(sizes)
    with cpu_activated():
        got = [torch.empty(size, 2) for size in sizes]
        handle = dist.all_gather(got, parts[world.rank], async_op=async_op)
        if async_op:
            handle.wait()
        assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))
        # Rank r sends r + peer + 1 numbers to each peer.
        sent = [torch.full((world.rank + peer + 1,), 10.0 * world.rank + peer) for peer in range(world.size)]
        got = [torch.empty(world.rank + peer + 1) for peer in range(world.size)]
        handle = dist.all_to_all(got, sent, async_op=async_op)
        if async_op:
            handle.wait()
        for peer, tensor in enumerate(got):
            assert torch.equal(tensor, torch.full_like(tensor, 10.0 * peer + world.rank))


@ranks(4)
def test_functions_for_features_need_no_shim(world):
    sizes = [3, 0, 5, 1]
    everything = torch.arange(2.0 * sum(sizes)).reshape(-1, 2)
    joined, handle = all_gather_uneven(everything.split(sizes)[world.rank], sizes)
    assert handle is None and torch.equal(joined, everything)
    joined, handle = all_gather_uneven(everything.split(sizes)[world.rank], sizes, async_op=True)
    handle.wait()
    assert torch.equal(joined, everything)
    mine, _ = reduce_scatter_uneven(everything * (world.rank + 1), sizes)
    assert torch.equal(mine, everything.split(sizes)[world.rank] * 10)
    with pytest.raises(ValueError, match=r"length 7 and sizes say .*; pass every rank's true length"):
        all_gather_uneven(torch.empty(7, 2), sizes)
    with pytest.raises(ValueError, match="sizes add up to 9"):
        reduce_scatter_uneven(torch.empty(7, 2), sizes)


def release_after_isend(world):
    """What the interleaved schedule does: send, give the storage back, and let somebody else have the memory."""
    length = 8192
    if world.rank == 1:
        world.barrier()  # the data leaves only when the receiver asks for it
        got = torch.empty(length)
        dist.recv(got, src=0)
        return bool((got == 7).all())
    tensor = torch.full((length,), 7.0)
    work = dist.isend(tensor, dst=1)
    tensor.data = torch.empty(1)
    taken = [torch.full((length,), -1.0) for _ in range(64)]
    world.barrier()
    work.wait()
    del taken
    return True


@ranks(2)
@pytest.mark.plain_memory
def test_a_sent_tensor_may_be_released(world):
    with cpu_activated():
        assert release_after_isend(world)
        operation = dist.P2POp(dist.isend, torch.ones(1), 1 - world.rank)  # compares functions by identity
        got = torch.zeros(1)
        for work in dist.batch_isend_irecv([operation, dist.P2POp(dist.irecv, got, 1 - world.rank)]):
            work.wait()
        assert got.item() == 1


@ranks(2)
@pytest.mark.plain_memory
def test_gloo_alone_sends_what_is_there_later(world):
    """The reason for the shim: without it the receiver gets somebody else's numbers."""
    isends = ("torch.distributed:isend", "torch.distributed.distributed_c10d:isend")
    with cpu_activated(without=isends):
        unharmed = release_after_isend(world)
    assert unharmed == (world.rank == 0)


def summing_whatever_is_asked(natives):
    """A backend that performs SUM for every reduction, as gloo's reduce_scatter_tensor did in torch 2.7."""
    return {
        name: lambda *args, op=None, native=native, **options: native(*args, op=dist.ReduceOp.SUM, **options)
        for name, native in natives.items()
    }


@ranks(4)
@pytest.mark.parametrize("ignored", [("reduce_scatter_tensor", "reduce_scatter"), ("all_reduce", "reduce")])
def test_a_backend_that_ignores_the_op_is_found_out(world, ignored):
    from mindspeed.platform.collectives import Reductions

    natives = {name: getattr(dist, name) for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter")}
    natives |= {"all_to_all_single": dist.all_to_all_single}
    deaf = natives | {name: summing_whatever_is_asked(natives)[name] for name in ignored}
    reductions, probe = Reductions(deaf), OpProbe(deaf)
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter"):
        assert probe.performs(name, dist.ReduceOp.SUM, world.group)
        assert probe.performs(name, dist.ReduceOp.MAX, world.group) == (name not in ignored), name
    mine = torch.arange(8.0) * (world.rank + 1)
    for op, factor in ((dist.ReduceOp.AVG, 2.5), (dist.ReduceOp.MAX, 4.0), (dist.ReduceOp.MIN, 1.0)):
        rows = slice(2 * world.rank, 2 * world.rank + 2)
        emulated = op == dist.ReduceOp.AVG or "all_reduce" not in ignored  # an all_reduce has AVG at most
        for call in (reductions.reduce_scatter_tensor, reductions.reduce_scatter):
            shard = torch.empty(2)
            call(shard, mine if call == reductions.reduce_scatter_tensor else list(mine.split(2)), op=op)
            assert torch.equal(shard, torch.arange(8.0)[rows] * factor), op
        tensor = mine.clone()
        expected = contextlib.nullcontext() if emulated else pytest.raises(PlatformError, match="wrong results for M.. in all")
        with expected:
            reductions.all_reduce(tensor, op=op)
            assert torch.equal(tensor, torch.arange(8.0) * factor)


@ranks(2)
def test_sparse_tensors_are_left_to_torch(world):
    with cpu_activated():
        sparse = torch.sparse_coo_tensor([[world.rank]], [2.0], (3,), device="cuda").coalesce()
        dist.all_reduce(sparse)
        assert sparse.to_dense().tolist() == [2, 2, 0]


@ranks(2)
def test_subgroups_and_non_members(world):
    with cpu_activated():
        alone = dist.new_group([0])
        tensor = torch.full((4,), 3.0, dtype=torch.bfloat16)
        if world.rank == 0:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG, group=alone)
        else:
            with pytest.warns(UserWarning, match="does not belong|not part of group"):
                assert dist.all_reduce(tensor, group=alone) is None
        assert tensor.tolist() == [3.0] * 4


def test_names_of_reductions():
    assert [op_name(getattr(dist.ReduceOp, name)) for name in ("SUM", "AVG", "MAX")] == ["SUM", "AVG", "MAX"]
