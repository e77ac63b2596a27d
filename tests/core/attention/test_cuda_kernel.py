"""CUDA kernels: numbers on a GPU; without one, arguments through stand-ins that do what aten's operators document."""

import pytest
import torch

from mindspeed.core.attention import CAUSAL, FULL, Dropout, Scoring, Visibility, attend, attend_backward
from mindspeed.core.attention.cuda_kernel import EfficientKernel, FlashKernel, window
from mindspeed.core.attention.dispatch import choose, kernels_for
from mindspeed.ops import _aten_attention
from tests.aten_stand_ins import stand_in
from tests.core.attention.test_kernels import assert_near, dense, dense_gradients, inputs

BF16, FP32 = torch.bfloat16, torch.float32
BAND = Visibility(past=5, future=2)
TILES = {
    "full": (33, 40, FULL),
    "causal": (33, 33, CAUSAL),
    "causal-tall": (40, 33, CAUSAL),
    "band": (33, 33, BAND),
    "shifted": (20, 24, Visibility(past=9, future=0, shift=-4)),
    "past": (20, 20, Visibility(past=3, shift=-2)),
}


@pytest.fixture
def stand(monkeypatch):
    """Kernels on stand-ins for aten's operators and a machine of compute capability 9.0."""
    yield from stand_in(monkeypatch)


def check(kernel, q, k, v, scoring, dtype):
    """Forward and backward against float64."""
    out, lse, state = kernel.forward(q, k, v, scoring)
    truth, truth_lse = dense(q, k, v, scoring)
    seen = ~torch.isinf(truth_lse)
    assert_near(out, truth, dtype)
    assert torch.equal(lse == float("-inf"), ~seen)
    torch.testing.assert_close(lse[seen].double(), truth_lse[seen], atol=1e-2 if dtype == BF16 else 1e-5, rtol=1e-3)
    grad_out = torch.randn(truth.shape, generator=torch.Generator().manual_seed(5)).to(q)
    ours = kernel.backward(grad_out, q, k, v, truth.to(q.dtype), truth_lse.float(), scoring, state)
    for gradient, expected in zip(ours, dense_gradients(q, k, v, scoring, grad_out), strict=True):
        assert gradient.shape == expected.shape
        assert_near(gradient, expected, dtype)


@pytest.mark.parametrize("value_dim", [12, 20, 24])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("tile", TILES)
def test_flash_arguments_mean_the_tile(stand, tile, groups, value_dim):
    queries, keys, visible = TILES[tile]
    q, k, v = inputs(queries, keys, groups=groups, dim=20, value_dim=value_dim, dtype=BF16)
    scoring = Scoring(0.3, visible)
    assert FlashKernel().declines(q, k, v, scoring) == ""
    check(FlashKernel(), q, k, v, scoring, BF16)
    fast = visible.is_full or (visible.is_causal and queries == keys)
    assert [call[1] for call in stand.calls] == [tile == "causal"] * 2
    assert all((call[2:4] == (-1, -1)) == fast for call in stand.calls)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_efficient_arguments_mean_the_tile(stand, monkeypatch, tile, dtype, with_bias):
    monkeypatch.setattr(_aten_attention, "ROWS", 32)
    queries, keys, visible = TILES[tile]
    q, k, v = inputs(queries, keys, groups=2, dim=20, value_dim=12, dtype=dtype)
    bias = torch.randn(1, 4, queries, keys, generator=torch.Generator().manual_seed(2)).to(dtype).float()
    bias[:, :, 3] = float("-inf")
    scoring = Scoring(0.3, visible, bias if with_bias else None)
    assert EfficientKernel().declines(q, k, v, scoring) == ""
    check(EfficientKernel(), q, k, v, scoring, dtype)
    if scoring.is_plain:
        assert stand.calls == [(name, False, visible.is_causal, 0.0) for name in ("efficient", "efficient_backward")]


def test_dropout_draws_from_the_seed_of_the_tile_and_leaves_the_generator(stand, monkeypatch):
    seeds = []

    class Generator:
        def get_state(self):
            return "before"

        def manual_seed(self, seed):
            seeds.append(seed)

        def set_state(self, state):
            seeds.append(state)

    monkeypatch.setattr(torch.cuda, "default_generators", [Generator()], raising=False)
    q, k, v = inputs(8, 8, dtype=BF16)
    scoring = Scoring(0.3, CAUSAL, dropout=Dropout(0.25, seed=77))
    for kernel in (FlashKernel(), EfficientKernel()):
        out, lse, state = kernel.forward(q, k, v, scoring)
        kernel.backward(out, q, k, v, out, lse, scoring, state)
    assert seeds == [77, "before"] * 2  # backward has its state from forward
    assert [call[-1] for call in stand.calls] == [0.25] * 4


def test_declined_calls_name_their_reason(stand, monkeypatch):
    kernel, scoring = FlashKernel(), Scoring(0.3)
    assert "float32" in kernel.declines(*inputs(4, 4), scoring)
    assert "bias" in kernel.declines(*inputs(4, 4, dtype=BF16), Scoring(0.3, bias=torch.zeros(4, 4)))
    assert "not 264" in kernel.declines(*inputs(4, 4, dim=264, dtype=BF16), scoring)
    assert "beside" in kernel.declines(*inputs(4, 8, dtype=BF16), Scoring(0.3, CAUSAL))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0" in kernel.declines(*inputs(4, 4, dtype=BF16), scoring)
    assert "8.0" in EfficientKernel().declines(*inputs(4, 4, dtype=BF16), scoring)
    assert not EfficientKernel().declines(*inputs(4, 4), scoring)
    assert "float64" in EfficientKernel().declines(*inputs(4, 4, dtype=torch.float64), scoring)


def test_order_of_kernels(stand):
    kernels = kernels_for("cuda")
    assert [kernel.name for kernel in kernels] == ["cuda-flash", "cuda-efficient", "math"]
    assert choose(*inputs(4, 4, dtype=BF16), Scoring(0.3, CAUSAL), kernels).name == "cuda-flash"
    assert choose(*inputs(4, 4), Scoring(0.3, CAUSAL), kernels).name == "cuda-efficient"
    assert choose(*inputs(4, 4, dtype=torch.float64), Scoring(0.3, CAUSAL), kernels).name == "math"


def test_window_of_a_planned_tile_is_never_negative():
    assert window(CAUSAL, 8, 8) == (None, 0)
    assert window(Visibility(past=5, future=0, shift=-3), 8, 11) == (5, 0)
    assert window(CAUSAL, 4, 8) == (None, -4)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_real_operators_take_our_arguments(monkeypatch, tile, dtype):
    """Schemas and shape functions of this torch, on tensors without memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    queries, keys, visible = TILES[tile]
    q, k, v = (tensor.to("meta") for tensor in inputs(queries, keys, dim=20, value_dim=12, dtype=dtype))
    for scoring in (Scoring(0.3, visible), Scoring(0.3, visible, torch.empty(queries, keys, device="meta"))):
        kernel = choose(q, k, v, scoring, kernels_for("cuda"))
        out, lse, state = kernel.forward(q, k, v, scoring)
        assert (out.shape, out.dtype) == ((2, 4, queries, 12), dtype) and (lse.shape, lse.dtype) == (q.shape[:3], FP32)
        gradients = kernel.backward(out, q, k, v, out, lse, scoring, state)
        assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.cuda
@pytest.mark.parametrize("value_dim", [16, 32])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_gpu_agrees_with_dense_attention(tile, dtype, groups, value_dim):
    queries, keys, visible = TILES[tile]
    q, k, v = (t.cuda() for t in inputs(queries, keys, groups=groups, dim=32, value_dim=value_dim, dtype=dtype))
    bias = torch.randn(1, 4, queries, keys, device="cuda").to(dtype).float()
    for scoring in (Scoring(0.3, visible), Scoring(0.3, visible, bias)):
        kernel = choose(q, k, v, scoring, kernels_for("cuda"))
        assert kernel.name == ("cuda-efficient" if scoring.bias is not None or dtype == FP32 else "cuda-flash")
        # fp32 products may be rounded to tf32 by neither kernel nor truth
        torch.backends.cuda.matmul.allow_tf32 = False
        check(kernel, q, k, v, scoring, BF16)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", [FlashKernel(), EfficientKernel()], ids=["flash", "efficient"])
def test_gpu_rows_that_see_nothing(kernel):
    q, k, v = (t.cuda() for t in inputs(40, 33, dim=32, dtype=BF16))
    scoring = Scoring(0.3, Visibility(past=2, future=0))
    out, lse, state = kernel.forward(q, k, v, scoring)
    blind = torch.isinf(dense(q, k, v, scoring)[1])
    assert blind.any() and torch.equal(lse == float("-inf"), blind) and (out[blind] == 0).all()
    gradients = kernel.backward(torch.ones_like(out), q, k, v, out, lse, scoring, state)
    assert all(torch.isfinite(gradient).all() for gradient in gradients) and (gradients[0][blind] == 0).all()


@pytest.mark.cuda
def test_gpu_dropout_repeats_with_its_seed_and_has_consistent_gradients():
    q, k, v = (t.cuda() for t in inputs(64, 64, dim=32, dtype=BF16))
    for dtype in (BF16, FP32):
        q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
        scoring = Scoring(0.3, CAUSAL, dropout=Dropout(0.3, seed=5))
        out, lse, state = attend(q, k, v, scoring)
        assert torch.equal(out, attend(q, k, v, scoring)[0])
        assert not torch.equal(out, attend(q, k, v, Scoring(0.3, CAUSAL, dropout=Dropout(0.3, seed=6)))[0])
        grad_out = torch.randn_like(out)
        dv = attend_backward(grad_out, q, k, v, out, lse, scoring, state)[2]
        torch.testing.assert_close((dv.float() * v).sum(), (out.float() * grad_out).sum(), rtol=2e-2, atol=0.5)
