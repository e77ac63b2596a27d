"""Token permutation from a routing map (tokens x experts), with the values of Megatron's unfused functions."""

# T tokens, E experts, H hidden, R permuted rows

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed.ops import _checks, _moe  # noqa: F401  (_moe defines the operator)
from mindspeed.ops._registry import strict

DESTINATION = "destination"


class RowMap(NamedTuple):
    """How rows were moved; `kind` tells what `tensor` means, so that maps of different origin cannot be mixed up."""

    kind: str
    tensor: Tensor


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, RowMap]:
    """Copy each token once per expert that it is routed to: `(permuted [R, H], permuted_probs [R] or None, row_map)`.

    tokens: [T, H]; routing_map: [T, E], bool or integer; probs: [T, E], float. Order: by expert, then by token. R is
    num_out_tokens, or the number of routed pairs if it is None, which costs a synchronisation with the device. With
    `drop_and_pad` each expert gets R / E rows: its routed tokens first, then others in the order of their indices.
    """
    op = "moe permute"
    _checks.tensor(op, "tokens", tokens, ndim=2)
    _checks.tensor(op, "routing_map", routing_map, (torch.bool, torch.uint8, torch.int8, *_checks.INDICES), ndim=2)
    _checks.require(
        op,
        "routing_map",
        routing_map.shape[0] == tokens.shape[0],
        f"must have {tokens.shape[0]} rows",
        tuple(routing_map.shape),
    )
    if probs is not None:
        _checks.tensor(op, "probs", probs)
        _checks.shape(op, "probs", probs, routing_map.shape)
    _checks.same_device(op, tokens=tokens, routing_map=routing_map, probs=probs)
    routing_map = routing_map.to(torch.bool)
    if num_out_tokens is None:
        drop_and_pad = False
        num_out_tokens = int(routing_map.sum())
    pairs = routing_map.numel()
    _checks.require(op, "num_out_tokens", 0 <= num_out_tokens, "must not be negative", num_out_tokens)
    if not drop_and_pad:
        _checks.require(op, "num_out_tokens", num_out_tokens <= pairs, f"must be at most {pairs} pairs", num_out_tokens)
    if strict() and not drop_and_pad:
        routed = int(routing_map.sum())
        _checks.require(
            op, "num_out_tokens", num_out_tokens <= routed, f"must be at most {routed} routed pairs", num_out_tokens
        )
    permuted, permuted_probs, row_map = torch.ops.mindspeed.moe_permute_map(
        tokens, routing_map, probs, num_out_tokens, drop_and_pad
    )
    return permuted, None if probs is None else permuted_probs, RowMap(DESTINATION, row_map)


def unpermute(permuted_tokens: Tensor, row_map: RowMap, restore_shape: Sequence[int], probs: Tensor | None = None) -> Tensor:
    """Sum the rows of each token, weighted by `probs` [T, E] if given: [T, H], summed in float32 and rounded once.

    `row_map` comes from `permute`; a map of another origin raises TypeError, because its numbers mean something else.
    """
    op = "moe unpermute"
    if not isinstance(row_map, RowMap) or row_map.kind != DESTINATION:
        kind = row_map.kind if isinstance(row_map, RowMap) else type(row_map).__name__
        raise TypeError(
            f"{op}: row_map must be a RowMap of destination rows from mindspeed.ops.moe_routing_map.permute, got {kind}"
        )
    _checks.tensor(op, "permuted_tokens", permuted_tokens, ndim=2)
    expected = (row_map.tensor.shape[0], permuted_tokens.shape[1])
    _checks.require(op, "restore_shape", tuple(restore_shape) == expected, f"must be {expected}", tuple(restore_shape))
    if probs is not None:
        _checks.tensor(op, "probs", probs)
        _checks.shape(op, "probs", probs, row_map.tensor.shape)
    _checks.same_device(op, permuted_tokens=permuted_tokens, row_map=row_map.tensor, probs=probs)
    return torch.ops.mindspeed.moe_token_unpermute(permuted_tokens, row_map.tensor, probs)
