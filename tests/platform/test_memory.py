"""Live bytes are counted exactly while metering and cheaply otherwise; torch.cuda's counters tell them."""

import gc

import pytest
import torch

from mindspeed.platform.memory import LiveMemoryCounter, LiveStorages, StorageMeter, live_storages

FLOAT = 4
KIB = 1024


@pytest.fixture
def start():
    gc.collect()
    return sum(live_storages())


def test_census_counts_storages_once(start):
    x = torch.zeros(KIB)
    view, twin = x[:10], x.view(2, -1)
    assert sum(live_storages()) - start == KIB * FLOAT
    on_meta = torch.zeros(KIB, device="meta")
    assert sum(live_storages()) - start == KIB * FLOAT
    del x
    assert sum(live_storages()) - start == KIB * FLOAT
    del view, twin, on_meta
    assert sum(live_storages()) == start


def test_census_sees_gradients_that_python_never_touched(start):
    weight = torch.zeros(KIB, requires_grad=True)
    (weight * 2).sum().backward()
    assert sum(live_storages()) - start == 2 * KIB * FLOAT


def test_meter_counts_what_autograd_saves():
    weight = torch.ones(KIB, requires_grad=True)
    with StorageMeter() as meter:
        live = meter.storages
        before = live.current
        hidden = weight * 2
        loss = (hidden * hidden).sum()
        del hidden
        gc.collect()
        assert live.current - before == KIB * FLOAT + FLOAT, "hidden is held by autograd alone, and the loss"
        loss.backward()
        del loss
        assert live.current - before == KIB * FLOAT, "the gradient is left"
        assert live.peak - before >= 3 * KIB * FLOAT
        weight.grad = None
        assert live.current == before


def test_meter_knows_what_was_there_before():
    x = torch.ones(KIB)
    with StorageMeter() as meter:
        assert meter.storages.current >= KIB * FLOAT
        before = meter.storages.current
        del x
        assert before - meter.storages.current == KIB * FLOAT


def test_meter_follows_resized_storages():
    resize = torch.UntypedStorage.resize_
    with StorageMeter() as meter:
        x = torch.ones(KIB)
        before = meter.storages.current
        x.untyped_storage().resize_(0)
        assert before - meter.storages.current == KIB * FLOAT
        meter.storages.reset_peak()
        x.untyped_storage().resize_(2 * KIB * FLOAT)
        assert meter.storages.current - before == KIB * FLOAT and meter.storages.peak == meter.storages.current
        assert torch.UntypedStorage.resize_ is not resize
    assert torch.UntypedStorage.resize_ is resize and "resize_" not in vars(torch.UntypedStorage)


def test_kinds():
    live = LiveStorages()
    weights = [torch.zeros(KIB) for _ in range(2)]
    live.mark(weights, "parameter")
    with StorageMeter(live, kind_of=lambda func, tensor: "activation"):
        activation = weights[0] + 1
        assert live.by_kind()["parameter"] == 2 * KIB * FLOAT and live.by_kind()["activation"] == KIB * FLOAT
        live.mark([activation], "optimizer")
        assert live.by_kind()["optimizer"] == KIB * FLOAT


def test_storages_may_outlive_their_meter():
    live = LiveStorages()
    x = torch.zeros(4)
    live.add(x)
    live.add(x[:2])
    assert len(live) == 1
    del live
    gc.collect()
    del x


def test_sparse_and_wrapper_tensors_do_not_disturb():
    with StorageMeter() as meter:
        sparse = torch.eye(3).to_sparse()
        assert sparse.sum().item() == 3 and meter.storages.current > 0


def test_counter_is_exact_while_metering_and_remembers_the_peak():
    counter = LiveMemoryCounter()
    counter.reset_peak()
    low = counter.read().current
    with counter.metering() as live:
        x = torch.zeros(64 * KIB)
        del x
        read = counter.read()
        assert read.peak - low >= 64 * KIB * FLOAT > read.current - low
        live.reset_peak()
    assert counter.read().peak - low >= 64 * KIB * FLOAT
    counter.reset_peak()
    assert counter.read().peak - low < 64 * KIB * FLOAT


def test_torch_cuda_tells_live_bytes(cpu):
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.zeros(256 * KIB, device="cuda")
    assert torch.cuda.memory_allocated("cuda:0") - before == 256 * KIB * FLOAT
    stats = torch.cuda.memory_stats()
    for key in ("allocated_bytes.all.current", "allocated_bytes.all.peak", "allocation.all.current"):
        assert stats[key] > 0
    assert stats["reserved_bytes.all.peak"] >= stats["reserved_bytes.all.current"] > 2**20
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 256 * KIB * FLOAT
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before
    with cpu.memory.metering():
        torch.zeros(256 * KIB)
        assert torch.cuda.max_memory_allocated() - before >= 256 * KIB * FLOAT
    assert torch.cuda.memory_stats_as_nested_dict()["allocation"]["all"]["current"] > 0
    assert "allocated_bytes.all.peak" in torch.cuda.memory_summary(abbreviated=True)
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total == cpu.memory_stats().total
    assert torch.cuda.memory_reserved() > 2**20 and torch.cuda.max_memory_reserved() >= torch.cuda.memory_reserved() // 2
    cpu.reset_peak_memory()
    assert cpu.memory_stats().peak >= cpu.memory_stats().current
