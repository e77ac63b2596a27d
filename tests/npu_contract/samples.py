"""Empty tensors on the NPU, short to write."""

from __future__ import annotations

import torch

BF16, FP16, FP32, INT8, INT32, INT64, BOOL = (
    torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def t(*shape, dtype=BF16, device="npu"):
    return torch.empty(*shape, dtype=dtype, device=device)


def f32(*shape):
    return t(*shape, dtype=FP32)


def i64(*shape):
    return t(*shape, dtype=INT64)


def i8(*shape):
    return t(*shape, dtype=INT8)


def host(*shape, dtype=BF16):
    return t(*shape, dtype=dtype, device="cpu")
