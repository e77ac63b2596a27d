"""Tensor-parallel collectives of megatron-core that return wrong results or stop on some backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch import distributed as dist

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform import Platform

_MAPPINGS = "megatron.core.tensor_parallel.mappings"


def reduce_contiguous(original: Callable[..., Tensor], input_: Tensor) -> Tensor:
    """All-reduce a contiguous tensor and return that very tensor.

    The host reduces `input_.contiguous()` but returns `input_`: a transposed or expanded tensor, such as the
    gradient of a sum, comes back unreduced.
    """
    return original(input_.contiguous())


def gather_uneven(
    original: Callable[..., Tensor],
    input_: Tensor,
    group: Any = None,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Gather along the first dimension; gloo has no gather of different sizes, an all-to-all does the same."""
    if output_split_sizes is None or dist.get_backend(group or _tensor_group()) != "gloo":
        return original(input_, group, output_split_sizes, use_global_buffer)
    group = group or _tensor_group()
    world_size = dist.get_world_size(group)
    if world_size == 1:
        return input_
    sizes = [int(size) for size in output_split_sizes]
    output = input_.new_empty((sum(sizes), *input_.shape[1:]))
    rows = input_.shape[0]
    everybodys = input_.contiguous().repeat(world_size, *[1] * (input_.dim() - 1))
    dist.all_to_all_single(output, everybodys, sizes, [rows] * world_size, group=group)
    return output


def scatter_uneven(
    original: Callable[..., Tensor],
    input_: Tensor,
    group: Any = None,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Reduce-scatter along the first dimension, with sizes as plain ints and contiguous parts."""
    if input_split_sizes is not None:
        input_split_sizes = [int(size) for size in input_split_sizes]
        input_ = input_.contiguous()
    return original(input_, group, input_split_sizes, use_global_buffer)


def _tensor_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def patches(platform: Platform) -> Iterator[Patch]:
    """Repair `_reduce` for everybody and the uneven gather where gloo is the backend."""
    yield wrap(f"{_MAPPINGS}:_reduce", reduce_contiguous, reason="a non-contiguous tensor came back unreduced")
    yield wrap(f"{_MAPPINGS}:_gather_along_first_dim", gather_uneven, reason="gloo cannot gather different sizes")
    yield wrap(f"{_MAPPINGS}:_reduce_scatter_along_first_dim", scatter_uneven, reason="split sizes must be ints")
