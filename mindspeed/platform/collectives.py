"""Collectives as every platform should offer them: the one module that knows what gloo lacks and closes each gap exactly.

Gaps: lists of unequal length, non-contiguous tensors, 16-bit sums that round at every hop (256+1+1+1 in bf16 gives 256
or 260), tensors read after the call returned, and, in some versions of torch, reductions that are ignored or refused.
The functions at the end are for features; `Reductions` and the functions before them are installed by the CPU platform.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.errors import PlatformError
from mindspeed.platform.op_probe import OPS, Native, OpProbe, combined, op_name, outside_coalescing

_NARROW = (torch.float16, torch.bfloat16)
_SUM, _AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
_EXACT_IN_16_BIT = ("MAX", "MIN")


class FinishingWork:
    """Handle of a collective whose result still has to be brought to the caller's tensors.

    `finish` runs once, as soon as the collective has completed, whether or not anybody waits; where the backend's
    handles know no futures, somebody has to wait or ask.
    """

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        self._work = work
        self._finish: Callable[[], None] | None = finish
        try:
            self._future = work.get_future().then(self._when_done)
        except RuntimeError:  # not every work has a future
            self._future = None

    def _when_done(self, future: Any) -> Any:
        result = future.value()  # raises what the collective raised
        self._bring()
        return result

    def _bring(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    def wait(self, *args: Any, **options: Any) -> bool:
        """Wait for the collective and for its result to be in place."""
        self._work.wait(*args, **options)
        if self._future is not None:
            self._future.wait()
        self._bring()
        return True

    def is_completed(self) -> bool:
        """Whether the result is in place."""
        if self._future is not None:
            return bool(self._future.done())
        if self._work.is_completed():
            self._bring()
        return self._finish is None

    def get_future(self) -> Any:
        """Future that completes when the result is in place."""
        return self._work.get_future() if self._future is None else self._future

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _finished(work: Any, async_op: bool, finish: Callable[[], None]) -> Any:
    if async_op and work is not None:
        return FinishingWork(work, finish)
    finish()
    return work


def all_reduce_in(
    dtype: torch.dtype, native: Native, tensor: Tensor, op: Any = _SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Reduce `tensor` in another dtype and round once into the caller's own tensor; its layout does not matter."""
    wide = tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
    work = native(wide, op=op, group=group, async_op=async_op)
    return _finished(work, async_op, lambda: _copy(wide, tensor))


def _copy(result: Tensor, to: Tensor) -> None:
    to.detach().copy_(result)


@dataclass(frozen=True)
class _Way:
    """How one reduction is done: in which dtype, with which op, divided by what; natively if that is right already."""

    dtype: torch.dtype
    op: Any
    divisor: int = 1
    is_native: bool = False

    def wide(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in the dtype of the reduction."""
        return tensor.detach().to(self.dtype, memory_format=torch.contiguous_format, copy=True)

    def result(self, reduced: Tensor) -> Tensor:
        """The reduction asked for, from the one that was done."""
        return reduced if self.divisor == 1 else reduced.div_(self.divisor)


class Reductions:
    """all_reduce, reduce, reduce_scatter and reduce_scatter_tensor with exact results on any CPU backend.

    Args:
        natives: torch's own functions by these names, and all_to_all_single.
    """

    def __init__(self, natives: Mapping[str, Native]) -> None:
        self._natives = natives
        self._probe = OpProbe(natives)
        self._coalesced: dict[Any, list[FinishingWork]] = {}

    def all_reduce(self, tensor: Tensor, op: Any = _SUM, group: Any = None, async_op: bool = False) -> Any:
        """As torch.distributed.all_reduce; 16-bit tensors are reduced in fp32 and rounded once."""
        if tensor.layout is not torch.strided:
            return self._natives["all_reduce"](tensor, op=op, group=group, async_op=async_op)
        way = self._way("all_reduce", tensor.dtype, op, group)
        if way.is_native and tensor.is_contiguous():
            return self._natives["all_reduce"](tensor, op=way.op, group=group, async_op=async_op)
        wide = way.wide(tensor)
        finish = lambda: _copy(way.result(wide), tensor)  # noqa: E731
        return self._run("all_reduce", (wide,), group, async_op, finish, op=way.op)

    def reduce_scatter_tensor(
        self, output: Tensor, input: Tensor, op: Any = _SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        """As torch.distributed.reduce_scatter_tensor; 16-bit tensors are summed in fp32 and rounded once."""
        way = self._way("reduce_scatter_tensor", input.dtype, op, group)
        if way.is_native and input.is_contiguous() and output.is_contiguous():
            return self._natives["reduce_scatter_tensor"](output, input, op=way.op, group=group, async_op=async_op)
        size = dist.get_world_size(group)
        return self._scatter(output, input, [input.numel() // size] * size, op, group, async_op)

    def reduce_scatter(
        self, output: Tensor, input_list: Sequence[Tensor], op: Any = _SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        """As torch.distributed.reduce_scatter, unequal lengths included; 16-bit tensors are summed in fp32."""
        way = self._way("reduce_scatter", output.dtype, op, group)
        inputs = list(input_list)
        if way.is_native and output.is_contiguous() and all(item.is_contiguous() for item in inputs):
            return self._natives["reduce_scatter"](output, inputs, op=way.op, group=group, async_op=async_op)
        joined = torch.cat([item.detach().reshape(-1) for item in inputs])
        return self._scatter(output, joined, [item.numel() for item in inputs], op, group, async_op)

    def _scatter(self, output: Tensor, input: Tensor, lengths: list[int], op: Any, group: Any, async_op: bool) -> Any:
        """Send every rank its part in the input's own dtype, reduce there: as many bytes as a ring, one rounding."""
        size, mine = len(lengths), output.numel()
        got = input.new_empty((size, mine))
        tensors = (got.view(-1), input.detach().contiguous().view(-1), [mine] * size, lengths)

        def finish() -> None:
            wide = got.float() if got.dtype in _NARROW else got
            _copy(combined(list(wide), op_name(op)).view_as(output), output)

        return self._run("all_to_all_single", tensors, group, async_op, finish)

    def reduce(
        self,
        tensor: Tensor,
        dst: int | None = None,
        op: Any = _SUM,
        group: Any = None,
        async_op: bool = False,
        group_dst: int | None = None,
    ) -> Any:
        """As torch.distributed.reduce; 16-bit tensors are reduced in fp32 and rounded once at the root."""
        way = self._way("reduce", tensor.dtype, op, group)
        root = {"dst": dst} if group_dst is None else {"group_dst": group_dst}
        if way.is_native and tensor.is_contiguous():
            return self._natives["reduce"](tensor, op=way.op, group=group, async_op=async_op, **root)
        me = dist.get_rank() if group_dst is None else dist.get_rank(group)
        is_root = me == (dst if group_dst is None else group_dst)
        wide = way.wide(tensor)
        finish = lambda: _copy(way.result(wide), tensor) if is_root else None  # noqa: E731
        return self._run("reduce", (wide,), group, async_op, finish, op=way.op, **root)

    def coalescing(self, native: Native) -> Native:
        """torch's coalescing manager, which must also wait for reductions that are not left to torch."""

        @contextlib.contextmanager
        def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
            key = group or dist.group.WORLD
            with native(group=group, device=device, async_ops=async_ops) as works:
                self._coalesced[key] = []
                try:
                    yield works
                finally:
                    ours = self._coalesced.pop(key)
            for work in ours:
                works.append(work) if async_ops else work.wait()

        return manager

    def _way(self, form: str, dtype: torch.dtype, op: Any, group: Any) -> _Way:
        if dist.get_rank(group) < 0:  # not a member: torch warns and does nothing
            return _Way(dtype, op, is_native=True)
        size, name = dist.get_world_size(group), op_name(op)
        if size == 1 and name in OPS:
            return _Way(dtype, _SUM, is_native=True)
        is_wide = dtype in _NARROW and name not in _EXACT_IN_16_BIT
        kind = torch.float32 if is_wide else dtype
        if self._probe.performs(form, op, group or dist.group.WORLD):
            coalesced = name != "SUM" and (group or dist.group.WORLD) in self._coalesced
            return _Way(kind, op, is_native=not is_wide and not coalesced)
        if name == "AVG":
            return _Way(kind, _SUM, divisor=size)
        if form.startswith("reduce_scatter") and name in OPS:
            return _Way(kind, op)
        raise PlatformError(f"backend {dist.get_backend(group)} gives wrong results for {name} in {form}; use another backend")

    def _run(
        self, form: str, tensors: tuple[Any, ...], group: Any, async_op: bool, finish: Callable[[], None], **options: Any
    ) -> Any:
        """Start a collective on buffers and arrange for its result; torch's coalescing gets a handle instead."""
        key = group or dist.group.WORLD
        held = self._coalesced.get(key)
        with outside_coalescing(key):
            work = self._natives[form](*tensors, group=group, async_op=async_op or held is not None, **options)
        if held is None:
            return _finished(work, async_op, finish)
        held.append(FinishingWork(work, finish))
        return held[-1] if async_op else None


def sending_alive(native: Native) -> Native:
    """isend of a view with a reference of its own: gloo reads the storage after the call returned."""

    def isend(tensor: Tensor, *args: Any, **options: Any) -> Any:
        return native(tensor.detach().contiguous(), *args, **options)

    return isend


def gathering_uneven(native: Native, all_to_all_single: Native) -> Native:
    """List all_gather whose entries may differ in shape."""

    def all_gather(tensor_list: Sequence[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if dist.get_rank(group) < 0 or len({item.shape for item in tensor_list}) == 1:
            return native(tensor_list, tensor.contiguous(), group=group, async_op=async_op)
        copies = [tensor.detach()] * len(tensor_list)
        return _exchange(all_to_all_single, tensor_list, copies, group, async_op)

    return all_gather


def exchanging_uneven(native: Native, all_to_all_single: Native) -> Native:
    """List all_to_all whose entries may differ in shape; no rank can see whether they do on all ranks."""

    def all_to_all(
        output_tensor_list: Sequence[Tensor], input_tensor_list: Sequence[Tensor], group: Any = None, async_op: bool = False
    ) -> Any:
        if dist.get_rank(group) < 0:
            return native(output_tensor_list, input_tensor_list, group=group, async_op=async_op)
        return _exchange(all_to_all_single, output_tensor_list, input_tensor_list, group, async_op)

    return all_to_all


def _exchange(
    all_to_all_single: Native, outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any, async_op: bool
) -> Any:
    sizes, lengths = [item.numel() for item in outputs], [item.numel() for item in inputs]
    sent = torch.cat([item.detach().reshape(-1) for item in inputs])
    got = sent.new_empty(sum(sizes))
    work = all_to_all_single(got, sent, sizes, lengths, group=group, async_op=async_op)

    def finish() -> None:
        for output, part in zip(outputs, got.split(sizes), strict=True):
            _copy(part.view_as(output), output)

    return _finished(work, async_op, finish)


def exchanging_any_layout(native: Native) -> Native:
    """all_to_all_single for tensors of any layout and splits of any integer kind."""

    def all_to_all_single(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        splits = _integers(output_split_sizes), _integers(input_split_sizes)
        if output.is_contiguous():
            return native(output, input.contiguous(), *splits, group=group, async_op=async_op)
        got = torch.empty_like(output, memory_format=torch.contiguous_format)
        work = native(got, input.contiguous(), *splits, group=group, async_op=async_op)
        return _finished(work, async_op, lambda: _copy(got, output))

    return all_to_all_single


def _integers(sizes: Any) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]


def gathering_any_layout(native: Native) -> Native:
    """all_gather_into_tensor for tensors of any layout."""

    def all_gather_into_tensor(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if output_tensor.is_contiguous():
            return native(output_tensor, input_tensor.contiguous(), group=group, async_op=async_op)
        got = torch.empty_like(output_tensor, memory_format=torch.contiguous_format)
        work = native(got, input_tensor.contiguous(), group=group, async_op=async_op)
        return _finished(work, async_op, lambda: _copy(got, output_tensor))

    return all_gather_into_tensor


def all_gather_uneven(tensor: Tensor, sizes: Sequence[int], group: Any = None, async_op: bool = False) -> tuple[Tensor, Any]:
    """Join the ranks' tensors [sizes[rank], ...] along the first dimension, on any backend.

    Returns:
        the joined tensor [sum(sizes), ...], without gradient, and the handle (None unless `async_op`).

    Raises:
        ValueError: this rank's tensor does not have the length that `sizes` says.
    """
    sizes = [int(size) for size in sizes]
    mine = sizes[dist.get_rank(group)]
    if tensor.shape[0] != mine:
        raise ValueError(f"this rank's tensor has length {tensor.shape[0]} and sizes say {mine}; pass every rank's true length")
    tensor = tensor.detach().contiguous()
    output = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
    if dist.get_backend(group) == "nccl":
        return output, dist.all_gather(list(output.split(sizes)), tensor, group=group, async_op=async_op)
    copies = tensor.repeat(len(sizes), *[1] * (tensor.dim() - 1))
    work = dist.all_to_all_single(output, copies, sizes, [mine] * len(sizes), group=group, async_op=async_op)
    return output, work


def reduce_scatter_uneven(
    tensor: Tensor, sizes: Sequence[int], group: Any = None, op: Any = _SUM, async_op: bool = False
) -> tuple[Tensor, Any]:
    """Reduce a tensor [sum(sizes), ...] over the ranks; rank r keeps its rows [sizes[r], ...], on any backend.

    Returns:
        this rank's rows, without gradient, and the handle (None unless `async_op`).

    Raises:
        ValueError: the tensor's length is not the sum of `sizes`.
    """
    sizes = [int(size) for size in sizes]
    if tensor.shape[0] != sum(sizes):
        raise ValueError(f"the tensor has length {tensor.shape[0]} and sizes add up to {sum(sizes)}; pass every rank's share")
    tensor = tensor.detach().contiguous()
    output = tensor.new_empty((sizes[dist.get_rank(group)], *tensor.shape[1:]))
    return output, dist.reduce_scatter(output, list(tensor.split(sizes)), op=op, group=group, async_op=async_op)
