"""Two random streams in one generator: what the host draws does not move the device's stream."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mindspeed.platform import host_rng, use_platform
from mindspeed.platform.cpu import Cpu
from mindspeed.testing import ranks
from tests.platform._activated import cpu_activated

LOADER = "torch.utils.data.dataloader"
SCOPE = tuple(
    f"{LOADER}:{method}"
    for method in (
        "_BaseDataLoaderIter.__init__",
        "_SingleProcessDataLoaderIter.__init__",
        "_MultiProcessingDataLoaderIter.__init__",
        "_BaseDataLoaderIter._reset",
        "_MultiProcessingDataLoaderIter._reset",
        "_BaseDataLoaderIter.__next__",
    )
)


def shuffled(workers=0, persistent=False):
    return DataLoader(
        TensorDataset(torch.arange(16.0)), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=persistent
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_does_not_move_the_devices_stream(cpu, workers):
    torch.manual_seed(1)
    device_before, host_before = torch.get_rng_state(), cpu.host_rng_state()
    loader = shuffled(workers, persistent=workers > 0)
    epochs = [[tuple(batch[0].tolist()) for batch in loader] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), device_before)
    assert not torch.equal(cpu.host_rng_state(), host_before)
    assert epochs[0] != epochs[1] and sorted(sum(epochs[0], ())) == list(range(16))
    torch.manual_seed(1)
    assert [tuple(batch[0].tolist()) for batch in shuffled(workers)] == epochs[0], (
        "torch.manual_seed seeds the host's stream too"
    )


def test_without_the_scope_it_does():
    with cpu_activated(without=SCOPE):
        before = torch.get_rng_state()
        list(shuffled())
        assert not torch.equal(torch.get_rng_state(), before)


def test_the_scope_nests_and_survives_errors(cpu):
    torch.manual_seed(3)
    device = torch.get_rng_state()
    with use_platform(cpu), pytest.raises(ZeroDivisionError), host_rng():
        first = torch.rand(2)
        with host_rng():
            second = torch.rand(2)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), device)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(2, generator=generator) for _ in range(2)]))


def test_the_hosts_state_can_be_saved_and_restored(cpu):
    with cpu.host_rng():
        torch.rand(5)
        inside = cpu.host_rng_state()
    saved = cpu.host_rng_state()
    assert torch.equal(saved, inside)
    with cpu.host_rng():
        drawn = torch.rand(4)
    cpu.set_host_rng_state(saved)
    with cpu.host_rng():
        assert torch.equal(torch.rand(4), drawn)
        cpu.set_host_rng_state(saved)
        assert torch.equal(torch.rand(4), drawn)


def test_device_names_speak_of_the_default_generator(cpu):
    torch.cuda.manual_seed(11)
    state, first = torch.cuda.get_rng_state(), torch.rand(3)
    assert torch.cuda.initial_seed() == torch.initial_seed() == 11
    torch.cuda.set_rng_state(state, device="cuda:0")
    assert torch.equal(torch.rand(3), first)
    torch.cuda.random.set_rng_state(state)
    assert torch.equal(torch.rand(3), first) and len(torch.cuda.get_rng_state_all()) == 1
    torch.cuda.set_rng_state_all([state])
    assert torch.equal(torch.rand(3, device="cuda"), first)
    generators = torch.cuda.default_generators
    assert len(generators) == 1 and generators[0] is generators[torch.cuda.current_device()] is torch.default_generator
    assert torch.equal(cpu.rng_state(), torch.get_rng_state())
    cpu.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_cuda_seeds_leave_the_hosts_stream_alone(cpu):
    torch.manual_seed(5)
    host = cpu.host_rng_state()
    torch.cuda.manual_seed(6)
    torch.cuda.manual_seed_all(7)
    torch.cuda.seed()
    assert torch.equal(cpu.host_rng_state(), host)
    torch.random.manual_seed(8)
    assert torch.equal(cpu.host_rng_state(), torch.Generator().manual_seed(8).get_state())


def test_callbacks_for_cuda_run_at_once(cpu):
    ran = []
    torch.cuda._lazy_call(lambda: ran.append(1))
    torch.cuda._lazy_init()
    assert ran == [1] and not torch.cuda.is_initialized()


def test_the_hosts_tracker_switches_streams(cpu):
    pytest.importorskip("megatron.core")
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("parallel", 123)
    default = torch.get_rng_state()
    with tracker.fork("parallel"):
        inside = torch.rand(4)
    assert torch.equal(inside, torch.rand(4, generator=torch.Generator().manual_seed(123)))
    assert torch.equal(torch.get_rng_state(), default)
    with tracker.fork("parallel"):
        assert not torch.equal(torch.rand(4), inside)


def test_the_tracker_is_deaf_without_the_shim():
    """Why `_lazy_call` is re-pointed: the queue is never emptied and the seeds never switch, silently."""
    pytest.importorskip("megatron.core")
    from megatron.core.tensor_parallel import random as host_random

    with cpu_activated(without=("torch.cuda:_lazy_call",)):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        host_random._set_cuda_rng_state(torch.Generator().manual_seed(2).get_state())
        assert torch.equal(torch.get_rng_state(), before)
    torch.cuda._queued_calls.clear()


class Net(torch.nn.Module):
    """A column- and a row-parallel layer around a replicated norm, with dropout on the replicated activations."""

    def __init__(self, rank, size):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        hidden = 16
        up, down = torch.randn(4 * hidden, hidden, generator=generator), torch.randn(hidden, 4 * hidden, generator=generator)
        self.norm = torch.nn.LayerNorm(hidden)
        self.up = torch.nn.Parameter(up.chunk(size)[rank].clone() / 4)
        self.down = torch.nn.Parameter(down.chunk(size, dim=1)[rank].clone() / 8)

    def forward(self, x):
        for _ in range(2):
            hidden = torch.relu(CopyToRanks.apply(self.norm(x)) @ self.up.t())
            x = torch.nn.functional.dropout(SumOverRanks.apply(hidden @ self.down.t()), 0.1) + x
        return x


class CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Training:
    """Tensor parallelism as the host does it: a DataLoader on the first rank only, batches broadcast."""

    def __init__(self, world):
        torch.manual_seed(7)
        self.net = Net(world.rank, world.size)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        self.is_source = world.rank == 0

    def epoch(self):
        data = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(9))
        batches = iter(DataLoader(data, batch_size=2)) if self.is_source else None
        for _ in range(3):
            batch = next(batches) if batches else torch.empty(2, 4, 16)
            torch.distributed.broadcast(batch, src=0)
            self.optimizer.zero_grad()
            self.net(batch).square().mean().backward()
            self.optimizer.step()
        return self

    def state(self):
        return {
            "net": {name: value.clone() for name, value in self.net.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
        }

    def resume(self, path):
        state = torch.load(path)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng_state"])
        torch.cuda.set_rng_state(state["cuda_rng_state"])
        return self


def largest_difference_between_ranks(tensor):
    top, bottom = tensor.clone(), tensor.clone()
    torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(bottom, op=torch.distributed.ReduceOp.MIN)
    return (top - bottom).max().item()


@ranks(2)
def test_replicated_weights_stay_equal_and_resume_is_exact(world):
    with cpu_activated():
        straight = Training(world).epoch()
        path = world.shared_dir / f"rank{world.rank}.pt"
        torch.save(straight.state(), path)
        uninterrupted = straight.epoch().state()["net"]
        for name in ("norm.weight", "norm.bias"):
            assert largest_difference_between_ranks(uninterrupted[name]) == 0, name
        resumed = Training(world).resume(path).epoch().state()["net"]
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


@ranks(2)
def test_without_the_scope_replicated_weights_drift_apart(world):
    with cpu_activated(without=SCOPE):
        weights = Training(world).epoch().epoch().state()["net"]
        assert largest_difference_between_ranks(weights["norm.weight"]) > 1e-6


def test_numpy_is_left_alone(cpu):
    before = np.random.get_state()[1].copy()
    torch.manual_seed(4)
    list(shuffled())
    assert (np.random.get_state()[1] == before).all()


def test_platforms_with_a_generator_of_their_own_draw_from_torchs(monkeypatch):
    from mindspeed.platform.cuda import Cuda

    with Cuda().host_rng():
        drawn = torch.rand(2)
    Cuda().set_host_rng_state(torch.Generator().manual_seed(1).get_state())
    assert torch.equal(Cuda().host_rng_state(), torch.Generator().manual_seed(1).get_state()) and drawn.shape == (2,)
    assert Cpu().host_stream is not Cpu().host_stream
