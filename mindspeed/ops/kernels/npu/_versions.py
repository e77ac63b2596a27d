"""What the installed torch_npu offers: arguments and operators came over the years, and are asked for by name."""

from __future__ import annotations

import functools

import torch
import torch_npu  # noqa: F401 - defines the operators of the namespace `npu`
from torch import Tensor


@functools.cache
def _parameters(name: str) -> frozenset[str]:
    schema = getattr(torch.ops.npu, name).default._schema
    return frozenset(argument.name for argument in schema.arguments)


@functools.cache
def offers(name: str) -> bool:
    """Whether torch_npu has the operator `npu::<name>`."""
    return hasattr(torch.ops.npu, name)


def known(name: str, **optional: object) -> dict[str, object]:
    """Those of the optional keyword arguments that this version's `npu::<name>` has."""
    return {key: value for key, value in optional.items() if key in _parameters(name)}


def lacks(name: str, *arguments: str) -> str | None:
    """Reason to step aside when torch_npu does not have `npu::<name>`, or the operator not all of these arguments; else None."""
    if not offers(name):
        return f"this torch_npu has no {name}"
    missing = sorted(set(arguments) - _parameters(name)) if arguments else []
    return f"{name} of this torch_npu has no {missing[0]}" if missing else None


def cannot_take(name: str, x: Tensor, dims: range | None = None) -> str | None:
    """Reason to step aside from `npu::<name>` for what x is: no kernel computes in float64, and some bound the dimensions."""
    if x.dtype == torch.float64:
        return f"{name} has no float64"
    if dims is not None and x.dim() not in dims:
        return f"{name} takes {dims.start} to {dims.stop - 1} dimensions, not {x.dim()}"
    return None
