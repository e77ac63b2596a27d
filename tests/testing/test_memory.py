"""Known answers of the memory meters."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mindspeed.testing import LiveMemory, saved_bytes

ROWS, WIDTH = 1024, 512


def eager_rms_norm(x, weight):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return wide.to(x.dtype) * weight


class LeanRmsNorm(torch.autograd.Function):
    """Keeps x and one fp32 factor per row, nothing else."""

    @staticmethod
    def forward(ctx, x):
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        ctx.save_for_backward(x, rstd)
        return (x * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("only its saved tensors matter here")


def ratio_saved(fn, x, *others):
    with saved_bytes(*others) as saved:
        kept = fn(x, *others)
        result = saved.bytes / x.nbytes
    del kept
    return result


@pytest.fixture
def x():
    return torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)


def test_rms_norm(x):
    weight = torch.ones(WIDTH, dtype=torch.bfloat16, requires_grad=True)
    assert ratio_saved(eager_rms_norm, x, weight) == pytest.approx(3.0 + 2 / WIDTH, abs=0.006)
    assert ratio_saved(LeanRmsNorm.apply, x) == 1 + 2 / WIDTH


def test_swiglu(x):
    def eager(t):
        gate, up = t.chunk(2, dim=-1)
        return F.silu(gate) * up

    assert ratio_saved(eager, x) == 1.5, "x once although both halves are saved, and silu(gate)"


def test_flash_attention_saves_inputs_output_and_statistics():
    q = torch.randn(1, 4, 128, 64, dtype=torch.bfloat16, requires_grad=True)
    with saved_bytes() as saved, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert saved.bytes == q.nbytes + out.nbytes + 4 * 128 * 4
        assert {kept.shape for kept in saved.tensors} == {(1, 4, 128, 64), (1, 4, 128)}


def test_parameters_apart_and_nothing_after_backward(x):
    layer = nn.Linear(WIDTH, 8, dtype=torch.bfloat16)
    with saved_bytes(layer) as saved:
        y = layer(x * 2)
        assert saved.bytes == x.nbytes
        assert saved.parameter_bytes == layer.weight.nbytes
        y.sum().backward()
        assert saved.bytes == saved.parameter_bytes == 0


def test_live_memory_splits_by_kind():
    model = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    x = torch.randn(16, 256)
    with LiveMemory(model, optimizer) as memory:
        start = memory.by_kind()
        y = model(x)
        after_forward = memory.by_kind()
        y.sum().backward()
        optimizer.step()
        end = memory.by_kind()
    size = model.weight.nbytes
    assert start["parameter"] == size and start["gradient"] == start["optimizer"] == start["activation"] == 0
    assert after_forward["activation"] == y.nbytes
    assert (end["parameter"], end["gradient"]) == (size, size)
    assert end["optimizer"] == 2 * size + 4, "two moments and the step counter"


@pytest.mark.plain_memory
def test_peak_is_exact_and_resizing_is_seen():
    with LiveMemory() as memory:
        start = memory.current
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del b
        assert (memory.current - start, memory.peak - start) == (1000, 1500)
        a.untyped_storage().resize_(0)
        assert memory.current == start
        memory.reset_peak()
        assert memory.peak == start


@pytest.mark.filterwarnings("ignore")
def test_torch_tracks_the_same_peak():
    from torch.distributed._tools.mem_tracker import MemTracker

    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(32, 64)

    def step():
        model(x).sum().backward()
        model.zero_grad(set_to_none=False)

    step()
    gc.collect()
    with LiveMemory(model) as memory:
        before = memory.current
        step()
    tracker = MemTracker()
    with warnings.catch_warnings(), tracker:
        warnings.simplefilter("ignore")
        tracker.track_external(model, x)
        start = sum(tracker.get_tracker_snapshot("current")[torch.device("cpu")].values()) // 2  # "Total" repeats the sum
        step()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert memory.peak - before == peak - start
