"""Kernels take tensors as they lie in memory."""

import pytest
import torch

from mindspeed.core.attention import CAUSAL, FULL, Scoring
from tests.core.attention.test_kernels import KERNELS, inputs

LAYOUTS = {
    "sequence first": lambda tensor: tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "heads far apart": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda tensor: torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("kernel", KERNELS, ids=["cpu", "math", "math-chunked", "npu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visible", [CAUSAL, FULL], ids=["causal", "full"])
def test_values_do_not_depend_on_strides(kernel, layout, visible):
    q, k, v = inputs(24, 24)
    grad = torch.ones(1, 1, 1, 1).expand(q.shape)  # as `out.sum().backward()` gives it: no stride at all
    scoring = Scoring(0.3, visible)
    results = []
    for place in (torch.Tensor.contiguous, LAYOUTS[layout]):
        tensors = [place(tensor) for tensor in (q, k, v)]
        out, lse, state = kernel.forward(*tensors, scoring)
        gradient = grad.contiguous() if place is torch.Tensor.contiguous else grad
        results.append((out, lse, *kernel.backward(gradient, *tensors, out, lse, scoring, state)))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-6)
