"""Weight-gradient accumulation in Triton: one group of the grouped form."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops.kernels.triton._grouped import grouped_weight_gradient
from mindspeed.ops.kernels.triton._launch import triton_body


@triton_body("matmul_add_")
def matmul_add_(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """`grad += grad_output^T @ total_input`, summed in float32 and rounded once."""
    ends = torch.full((1,), total_input.shape[0], dtype=torch.int64, device=grad.device)
    grouped_weight_gradient(grad_output, total_input, ends, grad.unsqueeze(0), accumulate=True)
