"""Weights of a sharded GPT by their place in the whole model: the same in every layout.

A parameter is named as in a distributed checkpoint, one name for each layer, `decoder.layers.2.mlp.linear_fc1.weight`;
this rank's part of it is known by global shape and offset, whatever tensor, pipeline or expert parallelism made of it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A rank's part of a whole weight.

    Attributes:
        name: of the whole weight.
        shape: of the whole weight.
        offset: of the part's first element in it.
        tensor: the part.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor

    @property
    def place(self) -> tuple[slice, ...]:
        """Where the part lies in the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.tensor.shape, strict=True))


def parts_of(model: nn.Module) -> Iterator[Part]:
    """This rank's parts of a megatron-core model; the tensors are the parameters themselves or views of them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: TID251 - test harness of that host
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: TID251

    state = model.sharded_state_dict()
    apply_factories(state)
    for item in nested_values(state):
        if isinstance(item, ShardedTensor):
            yield _part(item)


def _part(item: Any) -> Part:
    shape, offset, extra = tuple(item.global_shape), tuple(item.global_offset), item.prepend_axis_num
    name = item.key
    if extra and ".layers." in name:  # layers stacked along an axis of their own
        name = name.replace(".layers.", f".layers.{offset[0]}.", 1)
        shape, offset, extra = shape[1:], offset[1:], extra - 1
    return Part(name, shape, offset, item.data.detach().view((1,) * extra + tuple(item.data.shape)))


def fill(model: nn.Module) -> None:
    """Give every weight values that depend on its name and its place in the whole weight only.

    Matrices are normal with deviation 0.02, biases likewise, and scales of norms 1 + 0.1 x normal, so that no term of
    the model is trivial.

    Raises:
        AssertionError: a weight of the model is no view of what its checkpoint description shows.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values  # noqa: TID251
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: TID251

    def filled(item: Any) -> Any:
        if not isinstance(item, ShardedTensor):
            return item
        part = _part(item)
        part.tensor.copy_(_whole(part.name, part.shape)[part.place])
        return item.data

    for item in nested_values(model.sharded_state_dict()):
        if isinstance(item, ShardedTensorFactory):  # may describe copies, as grouped experts do, and knows the way back
            item.data.detach().copy_(item.merge_fn(dict_list_map_outplace(filled, item.build())))
        else:
            filled(item)
    for part in parts_of(model):
        wanted = _whole(part.name, part.shape)[part.place].to(part.tensor.dtype)
        assert torch.equal(part.tensor, wanted), f"{part.name}: its sharded_state_dict describes a copy, so it cannot be filled"


def _whole(name: str, shape: tuple[int, ...]) -> Tensor:
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))
    return 1 + 0.1 * values if len(shape) == 1 and name.endswith("weight") else 0.02 * values


def copies_of(models: Iterable[nn.Module]) -> list[Part]:
    """This rank's parts of several model chunks, copied so that they can be sent to another process."""
    return [Part(part.name, part.shape, part.offset, part.tensor.clone()) for model in models for part in parts_of(model)]


def join(parts_by_rank: Iterable[Iterable[Part]]) -> dict[str, Tensor]:
    """Whole weights from the parts of all ranks.

    Raises:
        AssertionError: parts that several ranks hold differ, or a piece of a weight is missing.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    differing: dict[str, float] = defaultdict(float)
    for part in (part for parts in parts_by_rank for part in parts):
        if part.name not in whole:
            whole[part.name] = torch.zeros(part.shape, dtype=part.tensor.dtype)
            seen[part.name] = torch.zeros(part.shape, dtype=torch.bool)
        target, marks = whole[part.name][part.place], seen[part.name][part.place]
        if marks.any() and not torch.equal(target[marks], part.tensor[marks]):
            differing[part.name] = max(differing[part.name], (target - part.tensor)[marks].abs().max().item())
        target.copy_(part.tensor)
        marks.fill_(True)
    assert not differing, f"ranks hold different copies of {dict(differing)} (largest difference)"
    missing = [name for name, marks in seen.items() if not marks.all()]
    assert not missing, f"no rank holds all of {missing}"
    return whole
