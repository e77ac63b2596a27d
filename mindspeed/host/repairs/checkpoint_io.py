"""Checkpoint reading and writing under newer torch and with fp32 parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem

from mindspeed.patching.patch import Patch, set_value, wrap
from mindspeed.platform import Platform

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async:_write_item"


def needs_format() -> bool:
    """Whether torch's private `_write_item` requires an argument that megatron-core does not pass."""
    parameter = inspect.signature(filesystem._write_item).parameters.get("serialization_format")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def write_item(*args: Any) -> Any:
    """`_write_item` of torch with the serialization format that older torch implied."""
    write: Callable[..., Any] = filesystem._write_item
    return write(*args, filesystem.SerializationFormat.TORCH_SAVE)


def patches(platform: Platform) -> Iterator[Patch]:
    """Complete the call into torch, and load distributed-optimizer state outside of autograd."""
    if needs_format():
        yield set_value(WRITER, write_item, reason=f"torch {torch.__version__} asks for a serialization format")
    yield wrap(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        without_grad,
        reason="fp32 main parameters are leaves that require grad; copying into them is refused otherwise",
    )


def without_grad(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the original with autograd off."""
    with torch.no_grad():
        return original(*args, **kwargs)
