"""Tokens in the order of their experts: one row per token and choice."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks, _moe  # noqa: F401  (_moe defines the operator)
from mindspeed.ops._registry import strict

OP = "npu_moe_token_permute"


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Copy each token once per choice, ordered by expert, stable: `(permuted [n, H], sorted_indices [T*K])`.

    tokens: [T, H], float. indices: [T, K] or [T], int32 or int64, not negative: the experts. n is T*K for num_out_tokens None
    or 0, at most num_out_tokens if it is positive, and T*K + num_out_tokens if negative. `sorted_indices[t*K + k]` (int32)
    is the row where choice k of token t went. Keeps sorted_indices; the gradient is summed in float32.
    """
    _checks.tensor(OP, "tokens", tokens, ndim=2)
    _checks.tensor(OP, "indices", indices, _checks.INDICES, ndim=(1, 2))
    _checks.require(
        OP, "indices", indices.shape[0] == tokens.shape[0], f"must have {tokens.shape[0]} rows", tuple(indices.shape)
    )
    _checks.same_device(OP, tokens=tokens, indices=indices)
    if padded_mode:
        raise NotImplementedError(f"{OP}: padded_mode=True has no meaning on any device; drop tokens through num_out_tokens")
    if strict() and indices.numel():
        _checks.require(OP, "indices", int(indices.min()) >= 0, "must not be negative", int(indices.min()))
    total = indices.numel()
    count = min(num_out_tokens, total) if num_out_tokens and num_out_tokens > 0 else total + (num_out_tokens or 0)
    _checks.require(OP, "num_out_tokens", count >= 0, f"must leave at least 0 of {total} rows", num_out_tokens)
    return torch.ops.mindspeed.moe_token_permute(tokens, indices, count)
