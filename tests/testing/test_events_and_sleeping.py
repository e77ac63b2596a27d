"""Order log, sleeping compute and delayed links, each with a known answer."""

import time

import pytest
import torch
import torch.distributed as dist

from mindspeed.testing import EventLog, SleepingStage, delayed_links, ranks


def test_order_of_own_events():
    log = EventLog()
    for kind, name in [("issue", "k1"), ("compute", "tile 0"), ("wait", "k1"), ("issue", "k2"), ("wait", "k2")]:
        log.record(kind, name)
    assert log.hidden_by("k1") == ["tile 0"] and log.exposed() == ["k2"] and log.unwaited() == []
    assert log.time("issue", "k1") < log.time("compute", "tile 0") < log.time("wait", "k1")
    with pytest.raises(LookupError, match="no wait of 'k3'"):
        log.time("wait", "k3")
    with pytest.raises(ValueError, match="'send' is none of issue, wait"):
        log.record("send", "k1")


@ranks(2)
def test_communication_and_operators_are_logged_in_order(world):
    x, weight = torch.ones(4, 4), torch.ones(4, 4)
    with EventLog().watching(compute=("aten::mm",), copy=("aten::clone",)) as log:
        work = dist.all_reduce(x, async_op=True)
        weight @ weight
        work.wait()
        dist.all_reduce(x)
        x.clone()
        left_open = dist.all_reduce(x, async_op=True)
    left_open.wait()
    assert [(event.kind, event.name) for event in log.events] == [
        ("issue", "all_reduce 0"),
        ("compute", "aten::mm"),
        ("wait", "all_reduce 0"),
        ("issue", "all_reduce 1"),
        ("wait", "all_reduce 1"),
        ("copy", "aten::clone"),
        ("issue", "all_reduce 2"),
    ]
    assert log.exposed() == ["all_reduce 1", "all_reduce 2"] and log.unwaited() == ["all_reduce 2"]


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def test_each_part_sleeps_by_itself():
    parts = []
    stage = SleepingStage(0.05, 0.1, 0.2, parts.append)
    x = torch.ones(3, requires_grad=True)
    forward, y = seconds(lambda: stage(x))
    by_input, (grad,) = seconds(lambda: torch.autograd.grad(y.sum(), x, retain_graph=True))
    by_weight, (of_weight,) = seconds(lambda: torch.autograd.grad(y.sum(), stage.weight))
    assert parts == ["F", "I", "W"]
    assert forward >= 0.05 and 0.1 <= by_input and 0.2 <= by_weight
    assert by_input < 0.2, "the gradient of the input does not wait for that of the weight"
    assert torch.equal(grad, torch.ones(3)) and of_weight.item() == 3
    both = SleepingStage(0, 0.01, 0.01, parts.append)
    both(x).sum().backward()
    assert sorted(parts[3:]) == ["F", "I", "W"]


@ranks(2)
def test_messages_are_held_and_queue_up(world):
    x = torch.full((1000,), float(world.rank))  # 4000 bytes: 40 ms at 100 kB/s
    world.barrier()
    with delayed_links(latency=0.05, bytes_per_second=1e5):
        if world.rank == 0:
            issuing, works = seconds(lambda: [dist.isend(x, 1) for _ in range(2)])
            x.fill_(7.0)
            assert issuing < 0.05, "the sender goes on"
            for work in works:
                work.wait()
        else:
            got = torch.empty(2, 1000)
            first, _ = seconds(lambda: dist.recv(got[0], 0))
            second, _ = seconds(lambda: dist.recv(got[1], 0))
            assert 0.08 < first and 0.03 < second < first
            assert got.eq(0.0).all(), "what was sent is what the buffer held at the call"
    before, _ = seconds(world.barrier)
    with delayed_links(latency=0.1):
        took, _ = seconds(lambda: dist.all_reduce(x))
    assert took >= 0.1
    assert not hasattr(dist.all_reduce(torch.ones(1), async_op=True), "_future"), "the original methods are back"
    assert before < 5


@ranks(2)
def test_delayed_transfers_hide_behind_compute(world):
    x = torch.ones(8)
    with delayed_links(latency=0.2):
        start = time.perf_counter()
        work = dist.all_reduce(x, async_op=True)
        time.sleep(0.2)
        work.wait()
        took = time.perf_counter() - start
    assert took < 0.39 and x.eq(2).all() and work.is_success()
