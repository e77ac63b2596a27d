"""Known answers of the flop counter."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mindspeed.testing import count_flops


def test_matmul_forward_and_backward():
    a = torch.randn(8, 16, requires_grad=True)
    b = torch.randn(16, 32, requires_grad=True)
    with count_flops() as counted:
        (a @ b).sum().backward()
    assert counted.by_phase == {"forward": 2 * 8 * 16 * 32, "backward": 2 * 2 * 8 * 16 * 32}
    assert counted.by_operator == {"aten::mm": counted.total}


@pytest.mark.parametrize("causal", [False, True])
def test_cpu_flash_attention(causal):
    q, k, v = (torch.randn(2, 3, 64, 32, requires_grad=True) for _ in range(3))
    with count_flops() as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()
    forward = 4 * 2 * 3 * 64 * 64 * 32 // (2 if causal else 1)
    assert counted.by_phase == {"forward": forward, "backward": forward * 5 // 2}


def test_recomputation_is_seen():
    weight = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(4, 16, requires_grad=True)
    with count_flops() as plain:
        (x @ weight).relu().sum().backward()
    with count_flops() as again:
        checkpoint(lambda t: (t @ weight).relu(), x, use_reentrant=False).sum().backward()
    assert again.total * 3 == plain.total * 4


def test_operators_of_this_library_are_looked_into():
    from mindspeed.ops._registry import REGISTRY, define

    def product(x, y):
        return x @ y

    define("flop_probe(Tensor x, Tensor y) -> Tensor", family="swiglu", reference=product, fake=product)
    try:
        with count_flops() as counted:
            torch.ops.mindspeed.flop_probe(torch.ones(2, 3), torch.ones(3, 4))
    finally:
        del REGISTRY.operators["flop_probe"]
    assert counted.by_operator == {"aten::mm": 2 * 2 * 3 * 4}
