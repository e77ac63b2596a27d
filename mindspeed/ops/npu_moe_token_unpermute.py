"""Expert outputs back in token order, summed with their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _checks, _moe  # noqa: F401  (_moe defines the operator)
from mindspeed.ops._registry import strict

OP = "npu_moe_token_unpermute"


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """`out[t] = sum_k probs[t, k] * permuted_tokens[sorted_indices[t*K + k]]`, summed in float32 and rounded once.

    permuted_tokens: [n, H], float. sorted_indices: [T*K], int32, as `npu_moe_token_permute` returns it; entries of n or more
    (dropped tokens) contribute nothing. probs: [T, K], float; None means K = 1 and weight 1. `restore_shape` has a meaning in
    padded mode only, which no device supports. Keeps sorted_indices, probs, and permuted_tokens if probs requires a gradient.
    """
    _checks.tensor(OP, "permuted_tokens", permuted_tokens, ndim=2)
    _checks.tensor(OP, "sorted_indices", sorted_indices, (torch.int32,), ndim=1)
    _checks.same_device(OP, permuted_tokens=permuted_tokens, sorted_indices=sorted_indices, probs=probs)
    if padded_mode:
        raise NotImplementedError(f"{OP}: padded_mode=True has no meaning on any device; drop tokens through num_out_tokens")
    shape = (sorted_indices.shape[0], 1)
    if probs is not None:
        _checks.tensor(OP, "probs", probs, ndim=2)
        _checks.require(
            OP,
            "probs",
            probs.numel() == sorted_indices.numel(),
            f"must have {sorted_indices.numel()} elements",
            tuple(probs.shape),
        )
        shape = probs.shape
    if strict():
        _check_permutation(sorted_indices)
    return torch.ops.mindspeed.moe_token_unpermute(permuted_tokens, sorted_indices.view(shape), probs)


def _check_permutation(sorted_indices: Tensor) -> None:
    count = sorted_indices.numel()
    whole = torch.equal(sorted_indices.sort().values, torch.arange(count, dtype=torch.int32, device=sorted_indices.device))
    _checks.require(OP, "sorted_indices", whole, f"must hold each of 0..{count - 1} once", sorted_indices.tolist())
