"""Compiled CUDA extensions of the host: not built, not asked for, or replaced where they cannot exist."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mindspeed.patching.patch import Patch, add, set_value, wrap
from mindspeed.platform import Platform

_SOFTMAX = "megatron.core.fusions.fused_softmax:FusedScaleMaskSoftmax.is_kernel_available"
_LAYERS = "megatron.core.tensor_parallel.layers"
_EXTENSION = "fused_weight_gradient_mlp_cuda"


def has_extension(name: str) -> bool:
    """Whether a compiled extension module can be imported."""
    return importlib.util.find_spec(name) is not None


def no_softmax_kernel(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """Answer for a machine without the extension: the host then uses its torch formula."""
    return False


def build_nothing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Leave out a compilation whose result nobody uses on this device."""


def accumulate_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """`main_grad += grad_output^T @ total_input`; the feature gradient-accumulation-fusion puts its operator here."""
    main_grad.add_(grad_output.t().float() @ total_input.float())


def accumulate_16_bit(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same for a `main_grad` of 16 bits: summed in float32 and rounded once."""
    main_grad.copy_(main_grad.float() + grad_output.t().float() @ total_input.float())


def patches(platform: Platform) -> Iterator[Patch]:
    """Repairs inside megatron-core."""
    if platform.name != "cuda" or not has_extension("scaled_masked_softmax_cuda"):
        yield wrap(_SOFTMAX, no_softmax_kernel, reason="the fused softmax extension is not installed")
    if not has_extension(_EXTENSION):
        yield from accumulation_patches()


def accumulation_patches() -> Iterator[Patch]:
    """Give `--gradient-accumulation-fusion`, the host's default, the two functions it calls."""
    from megatron.core.tensor_parallel import layers

    why = f"gradient accumulation fusion is on by default and {_EXTENSION} is not installed"
    functions = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate_fp32, wgrad_gemm_accum_fp16=accumulate_16_bit)
    introduce = set_value if hasattr(layers, _EXTENSION) else add
    yield introduce(f"{_LAYERS}:{_EXTENSION}", functions, reason=why)
    yield set_value(f"{_LAYERS}:_grad_accum_fusion_available", True, reason=why)


def training_patches(platform: Platform) -> Iterator[Patch]:
    """Repairs inside megatron.training and megatron.legacy."""
    if platform.name == "cuda" and shutil.which("nvcc"):
        return
    why = "the legacy kernels need nvcc and CUDA"
    yield wrap("megatron.legacy.fused_kernels:load", build_nothing, reason=why)
    if platform.name != "cuda":
        yield wrap("megatron.training.initialize:set_jit_fusion_options", build_nothing, reason="nothing is fused here")
