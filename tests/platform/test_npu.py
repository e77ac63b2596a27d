"""The NPU platform on the real torch_npu without a device: what its transfer covers, and what we add (P9)."""

import contextlib
import functools

import pytest
import torch

from mindspeed.errors import PlatformError
from mindspeed.testing.npu_contract import place, unavailable
from mindspeed.testing.shipped import shared_process, shipped

pytestmark = pytest.mark.npu_contract


def untouched():
    return place(load=False)


def transferred(function):
    """Run in a process that these tests share: the transfer cannot be undone, so no other test may get that process."""
    process = functools.partial(shared_process, "npu platform", untouched)
    return shipped(function, process, unavailable, {"calls"}, seconds=120, keep=True)


@contextlib.contextmanager
def activated():
    from mindspeed.patching.ledger import Ledger
    from mindspeed.platform import named

    platform, ledger = named("auto"), Ledger()
    assert platform.name == "npu"
    platform.activate(ledger)
    try:
        yield platform, ledger
    finally:
        ledger.revert()


@contextlib.contextmanager
def hccl_world():
    dist = torch.distributed
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.get_backend() == "hccl"
        yield dist
    finally:
        dist.destroy_process_group()


@transferred
def test_what_the_transfer_covers():
    import warnings

    import torch_npu  # noqa: F401

    filters = list(warnings.filters)
    with activated():
        assert warnings.filters == filters, "the transfer's own filter must not stay"
        x = torch.zeros(2, device="cuda")
        assert x.device.type == "npu" and x.is_cuda and torch.ones(2, device="cuda:0").device.type == "npu"
        assert torch.zeros(2).cuda().device.type == "npu" and torch.nn.Linear(2, 2).cuda().weight.device.type == "npu"
        for name in ("Stream", "Event", "memory_allocated", "synchronize", "set_device", "FloatTensor"):
            theirs = getattr(torch.cuda, name)
            assert theirs is getattr(torch.npu, name) or hasattr(theirs, "__wrapped__"), name
        assert torch.cuda.DoubleTensor is torch.npu.FloatTensor and torch.cuda.CUDAGraph is torch.npu.NPUGraph
        assert torch.jit.script(len) is len and torch.utils._triton.has_triton() is False
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.is_autocast_enabled("npu")
        assert x.type() == "torch.npu.FloatTensor"


@transferred
def test_what_we_add():
    import torch_npu.contrib.transfer_to_npu  # noqa: F401

    left_to_cuda = {name: getattr(torch.cuda, name) for name in ("_lazy_call", "_lazy_init", "cudart", "clock_rate")}
    for name, original in left_to_cuda.items():
        assert original.__module__ == "torch.cuda", f"torch_npu covers {name} now"
    with activated() as (_, ledger):
        ran = []
        torch.cuda._lazy_init()
        torch.cuda._lazy_call(lambda: ran.append(1))
        assert ran == [1] and torch.npu.is_initialized()
        assert torch.cuda.temperature() == torch.cuda.power_draw() == torch.cuda.clock_rate() == 0
        with pytest.raises(
            PlatformError, match=r"torch.cuda.cudart needs a CUDA device \(platform npu\); add --use-pytorch-pro"
        ):
            torch.cuda.cudart()
        rows = {row.target: row for row in ledger.rows}
        assert rows["torch_npu.contrib.transfer_to_npu"].operation == "permanent"
        assert {row.owner for row in ledger.rows} == {"platform.npu"} and all(row.reason for row in ledger.rows)
    for name, original in left_to_cuda.items():
        assert getattr(torch.cuda, name) is original
    assert [row.operation for row in ledger.rows] == ["permanent"]


@transferred
def test_activation_is_idempotent_and_works_again_after_revert():
    with activated() as (platform, ledger):
        count = len(ledger.rows)
        platform.activate(ledger)
        assert len(ledger.rows) == count
        ledger.revert()
        platform.activate(ledger)
        assert len(ledger.rows) == count and torch.cuda.clock_rate() == 0


@transferred
def test_answers():
    with activated() as (platform, _):
        assert (platform.name, platform.device_type, platform.backend, platform.is_async) == ("npu", "npu", "hccl", True)
        assert platform.device() == torch.device("npu", 0) and platform.device(1) == torch.device("npu", 1)
        assert platform.device_count() == 1 and "platform npu" in platform.describe()
        stream, event = platform.stream(), platform.event(timing=True)
        with platform.on_stream(stream):
            assert platform.current_stream() == stream
            event.record()
        platform.synchronize()
        state = platform.rng_state()
        platform.set_rng_state(state)
        assert torch.equal(platform.rng_state(), state) and platform.host_rng_state().numel() > state.numel()
        x = torch.zeros(2**18, device="npu")
        stats = platform.memory_stats()
        assert stats.total > stats.reserved >= stats.current >= x.numel() * 4 and stats.peak >= stats.current
        platform.reset_peak_memory()
        assert platform.peak_flops(torch.bfloat16) is None
        assert platform.supports("graphs") and not platform.supports("compile") and "Triton" in platform.why_not("compile")
        assert platform.supports("fused:rms_norm") and not platform.supports("fused:no_such_operator")


@transferred
def test_fp64_sums_are_done_in_fp32_for_every_form_of_the_call(calls):
    with activated(), hccl_world() as dist:
        forms = [
            lambda x: dist.all_reduce(x),
            lambda x: dist.all_reduce(tensor=x, op=dist.ReduceOp.MAX),
            lambda x: dist.all_reduce(x, dist.ReduceOp.SUM, None, False),
            lambda x: dist.all_reduce(x, async_op=True).wait(),
            lambda x: dist.all_reduce(x, dist.ReduceOp.SUM, dist.group.WORLD, True).wait(),
        ]
        for form in forms:
            x = torch.zeros(3, dtype=torch.float64, device="cuda")
            calls.reset()
            form(x)
            assert calls.names == ["aclnnInplaceCopy", "HcclAllReduce", "aclnnInplaceCopy"]
            there, back = calls.named("aclnnInplaceCopy")
            assert [argument.dtype for argument in there.tensors] == ["float32", "float64"]
            assert [argument.dtype for argument in back.tensors] == ["float64", "float32"], "into the caller's own tensor"
        calls.reset()
        dist.all_reduce(torch.zeros(3, device="cuda"))
        assert "aclnnInplaceCopy" not in calls.names


@transferred
def test_the_hosts_random_tracker_works():
    pytest.importorskip("megatron.core")
    from megatron.core.tensor_parallel import random as host_random

    with activated():
        assert host_random._lazy_call is torch.cuda._lazy_call, "re-pointed although imported before"
        torch.cuda._lazy_init()
        tracker = host_random.CudaRNGStatesTracker()
        tracker.add("parallel", 123)
        before = torch.cuda.get_rng_state()
        with tracker.fork("parallel"):
            assert not torch.equal(torch.cuda.get_rng_state(), before)
        assert torch.equal(torch.cuda.get_rng_state(), before)


def test_signals_travel_on_gloo_as_before(monkeypatch):
    from mindspeed.platform.npu import Npu

    (patch,) = Npu().training_patches()
    assert patch.target == "megatron.training.dist_signal_handler:get_device" and patch.owner == "platform.npu"
    monkeypatch.setattr(torch.distributed, "get_backend", lambda *group: "gloo")
    assert patch.value(lambda local_rank: torch.device("cpu"), 3) == torch.device("cpu")


@transferred
def test_signals_travel_on_the_npu_with_hccl():
    with activated() as (platform, _), hccl_world():
        (patch,) = platform.training_patches()
        assert patch.value(None, 0) == torch.device("npu", 0) and patch.value(None).type == "npu"
