"""How the CPU kernel cuts bands into calls: exact, and with little visited beyond what is visible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed.core.attention import Scoring, Visibility, cpu_kernel
from mindspeed.core.attention.cpu_kernel import CpuKernel
from tests.core.attention.test_kernels import assert_near, dense, dense_gradients, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (60, 41), (33, 90)], ids=str)
@pytest.mark.parametrize(
    "visible",
    [
        Visibility(20, 0),
        Visibility(30, 3),
        Visibility(None, 0, -5),
        Visibility(23, -2, 7),
        Visibility(4, None),
        Visibility(9, 9),
    ],
    ids=str,
)
def test_chunks_of_rows_and_edges_of_bands(monkeypatch, visible, shape, dtype):
    """Chunks as small as the inputs need: inner keys without a mask, edges with one or a triangle."""
    monkeypatch.setattr(cpu_kernel, "ROWS", 8)
    monkeypatch.setattr(cpu_kernel, "INTERIOR", 4)
    q, k, v = inputs(*shape, dtype=dtype)
    scoring, kernel = Scoring(0.3, visible), CpuKernel()
    out, lse, _ = kernel.forward(q, k, v, scoring)
    truth, truth_lse = dense(q, k, v, scoring)
    assert_near(out, truth, dtype)
    assert torch.equal(torch.isinf(lse), torch.isinf(truth_lse))
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = kernel.backward(grad_out, q, k, v, truth.to(dtype), truth_lse.float(), scoring, None)
    for gradient, expected in zip(gradients, dense_gradients(q, k, v, scoring, grad_out), strict=True):
        assert_near(gradient, expected, dtype)


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 40),
    past=st.none() | st.integers(-3, 40),
    future=st.none() | st.integers(-8, 12),
    shift=st.integers(-10, 10),
)
def test_edges_and_interior_are_the_keys_of_the_chunk(start, past, future, shift):
    visible, rows = Visibility(past, future, shift), range(start, start + 8)
    keys = visible.key_range(rows, 50)
    parts = cpu_kernel.cut_at_edges(rows, keys, visible) if keys else []
    assert [key for part in parts for key in part] == list(keys)
    if len(parts) == 3:
        assert visible.mask(rows, parts[1], torch.device("cpu")) is None


@pytest.mark.parametrize(("window", "most"), [(1024, 1.15), (2048, 1.07), (4096, 1.03)])
def test_a_band_visits_little_more_than_it_shows(window, most):
    visited, visible = 0, Visibility(window - 1, 0)
    q = torch.empty(1, 1, 8192, 1, device="meta")
    for rows, calls in cpu_kernel._calls(q, q, Scoring(1.0, visible)):
        for call in calls:
            visited += len(rows) * (len(rows) + 1) // 2 if call.causal else len(rows) * len(call.keys)
    seen = sum(min(row + 1, window) for row in range(8192))
    assert seen <= visited <= most * seen
