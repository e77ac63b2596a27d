"""What the installed torch_npu offers: arguments and operators came over the years, and are asked for by name."""

from __future__ import annotations

import functools

import torch
import torch_npu  # noqa: F401 - defines the operators of the namespace `npu`


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


def lacks(name: str) -> str | None:
    """Reason to step aside when torch_npu does not have `npu::<name>`, else None."""
    return None if offers(name) else f"this torch_npu has no {name}"
