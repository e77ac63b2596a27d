"""Group lists: which rows belong to which group, as cumulative ends or as sizes, on the host or on the device."""

# G groups, M rows

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._registry import on_host, strict
from mindspeed.ops._transfer import to_device

ENDS, SIZES = 0, 1


def as_tensor(op: str, name: str, group_list: Sequence[int] | Tensor, x: Tensor, list_type: int, groups: int | None) -> Tensor:
    """Check a list, a CPU tensor or a tensor on the device of `x`, and return an int64 tensor there.

    Values are checked where they are on the host, or anywhere under `MINDSPEED_OPS_STRICT=1`. Raises TypeError for another
    dtype, ValueError for another length, RuntimeError for another device.
    """
    if isinstance(group_list, Tensor):
        _checks.tensor(op, name, group_list, (torch.int64,), ndim=1)
        _checks.near(op, name, group_list, x.device)
        on_device = to_device(group_list, x.device)
    else:
        check_integers(op, name, group_list)
        on_device = to_device(group_list, x.device)
    if groups is not None:
        _checks.require(op, name, len(group_list) == groups, f"must have one entry per group ({groups})", len(group_list))
    return on_device


def check_integers(op: str, name: str, values: object) -> None:
    """Require a list or tuple of integers."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list of int or an int64 tensor, got {type(values).__name__}")
    if not all(isinstance(value, int) for value in values):
        raise TypeError(f"{op}: {name} must hold integers, got {list(values)}")


def check_values(op: str, name: str, group_list: Sequence[int] | Tensor, rows: int, list_type: int) -> None:
    """Check the values of a list or of a tensor on the host, and of any tensor under `MINDSPEED_OPS_STRICT=1`."""
    if not isinstance(group_list, Tensor):
        host_sizes(op, name, group_list, rows, list_type)
    elif on_host(group_list) or strict():
        host_sizes(op, name, group_list.tolist(), rows, list_type)


def host_sizes(op: str, name: str, values: Sequence[int], rows: int, list_type: int) -> list[int]:
    """Sizes of the groups; raises ValueError for negative or decreasing values or more rows than there are."""
    if list_type == SIZES:
        sizes = list(values)
        total = sum(sizes)
        rule = "must hold sizes that are not negative"
    else:
        starts = [0, *values][: len(values)]
        sizes = [end - start for start, end in zip(starts, values, strict=True)]
        total = values[-1] if len(values) else 0
        rule = "must hold cumulative ends that do not decrease"
    _checks.require(op, name, not sizes or min(sizes) >= 0, rule, list(values))
    _checks.require(op, name, total <= rows, f"must not count more than the {rows} rows", list(values))
    return sizes


def ends_of(group_list: Tensor, list_type: int) -> Tensor:
    """Cumulative ends as an int64 tensor on the device of the list."""
    return group_list.cumsum(0) if list_type == SIZES else group_list


def spans(sizes: Sequence[int]) -> list[slice]:
    """The rows of each group."""
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found
