"""A stand-in for `flash_attn` on a CPU, so that libraries written for it run on the same kernel as ours.

Installed into `sys.modules` by `installed()` for the time of an import; nothing else can import it.
"""

# q, k, v [B, S, heads, D]; lse [B, heads, S]

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, *unused: Any, **named: Any
) -> tuple[Tensor, Tensor, None, None]:
    """Output [B, S, heads, D] and log-sum-exp."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse = _forward(q, k, v, 0.0, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(  # noqa: PLR0913 - the library's signature
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, *unused: Any, **named: Any,
) -> None:  # fmt: skip
    """Writes the gradients into dq, dk, dv."""
    dout, q, k, v, out = (tensor.transpose(1, 2) for tensor in (dout, q, k, v, out))
    gradients = _backward(dout, q, k, v, out, softmax_lse, 0.0, causal, scale=softmax_scale)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient.transpose(1, 2))


def _unavailable(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the stand-in has no packed sequences")


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`import flash_attn` gives the stand-in inside the block, if the real one is not installed."""
    if importlib.machinery.PathFinder.find_spec("flash_attn") is not None:
        yield
        return
    package, interface = (_module(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_forward = interface._flash_attn_varlen_backward = _unavailable  # type: ignore[attr-defined]
    package.__version__ = "2.7.0"  # type: ignore[attr-defined]
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    package.flash_attn_func = package.flash_attn_varlen_func = _unavailable  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"flash_attn": package, "flash_attn.flash_attn_interface": interface}):
        yield
        loaded = {name: module for name, module in sys.modules.items() if not name.startswith("flash_attn")}
    sys.modules.update(loaded)  # what was imported meanwhile stays


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    return module
