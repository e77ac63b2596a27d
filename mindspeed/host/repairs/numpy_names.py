"""Names that numpy 2 dropped and megatron-core's checkpoint code still uses."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import numpy

from mindspeed.patching.patch import Patch, set_value
from mindspeed.platform import Platform

MODULES = (
    "megatron.core.dist_checkpointing.mapping",
    "megatron.core.dist_checkpointing.validation",
    "megatron.core.dist_checkpointing.exchange_utils",
)


class NumpyOfOld(types.ModuleType):
    """numpy as megatron-core 0.12.1 knows it; numpy itself stays untouched for everybody else."""

    def __init__(self) -> None:
        super().__init__("numpy")
        self.product = numpy.prod

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


def patches(platform: Platform) -> Iterator[Patch]:
    """Give the three modules a numpy that has `product`."""
    if hasattr(numpy, "product"):
        return
    view = NumpyOfOld()
    for module in MODULES:
        yield set_value(f"{module}:np", view, reason=f"numpy {numpy.__version__} has no numpy.product")
