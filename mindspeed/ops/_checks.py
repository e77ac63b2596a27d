"""Argument checks of the public operators: one text on all devices, before anything is dispatched.

TypeError for a wrong type or dtype, ValueError for a wrong shape or option, RuntimeError for a device mismatch; each names the
operator, the argument, what was expected and what was given. The checks read metadata only, so they cost no synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


def tensor(
    op: str, name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATS, ndim: int | tuple[int, ...] | None = None
) -> None:
    """Require a tensor of one of `dtypes` and, if given, of `ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must have dtype {_names(dtypes)}, got {_names((value.dtype,))}")
    if ndim is not None and value.dim() not in (allowed := ndim if isinstance(ndim, tuple) else (ndim,)):
        wanted = " or ".join(map(str, allowed))
        raise ValueError(f"{op}: {name} must have {wanted} dimensions, got shape {tuple(value.shape)}")


def shape(op: str, name: str, value: Tensor, *expected: Sequence[int]) -> None:
    """Require one of the expected shapes."""
    if not any(tuple(value.shape) == tuple(wanted) for wanted in expected):
        wanted = " or ".join(str(tuple(wanted)) for wanted in expected)
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(value.shape)}")


def dtype_of(op: str, name: str, value: Tensor, *expected: torch.dtype) -> None:
    """Require one of the expected dtypes, which usually follow from another argument."""
    if value.dtype not in expected:
        raise TypeError(f"{op}: {name} must have dtype {_names(expected)}, got {_names((value.dtype,))}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Require all given tensors on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value is not None and value.device != first.device:
            raise RuntimeError(f"{op}: {name} must be on {first.device} like {first_name}, got {value.device}")


def near(op: str, name: str, value: Tensor, device: torch.device) -> None:
    """Require a tensor on `device` or on the CPU, from where it will be moved."""
    if value.device.type != "cpu" and value.device != device:
        raise RuntimeError(f"{op}: {name} must be on {device} or on the CPU, got {value.device}")


def require(op: str, name: str, condition: bool, rule: str, actual: object) -> None:
    """Raise ValueError `op: name rule, got actual` unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {name} {rule}, got {actual}")


def option(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Require one of a few allowed values."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def word(op: str, name: str, value: object, allowed: Sequence[str]) -> str:
    """Require one of a few words in any case; returns it in the case of `allowed`."""
    found = {item.lower(): item for item in allowed}.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        option(op, name, value, allowed)
    return found


def wide_dtype(value: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64 input (gradcheck), float32 for all others."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def forward_only(op: str, hint: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if gradients are recorded and an input wants one, which the operator cannot give."""
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors):
        raise RuntimeError(f"{op}: has no derivative, got an input that requires grad; {hint}")
