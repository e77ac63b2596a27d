"""Fused token permutation: tokens move to their experts and back by one gather each, without promoted copies or host syncs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mindspeed.core.transformer.fused_choice import configs_say, contradictions
from mindspeed.errors import TargetError
from mindspeed.ops import moe_routing_map
from mindspeed.ops.sort_chunks import sort_chunks
from mindspeed.patching import Change, Feature, Patch, Problem, RunShape, add, flag, set_value, wrap

OPTION, HOST_OPTION = "--use-fused-moe-token-permute-and-unpermute", "--moe-permute-fusion"
UTILS = "megatron.core.transformer.moe.moe_utils"


@dataclass(frozen=True, kw_only=True)
class PermuteFlags:
    """Flags of `MoePermuteFusion`."""

    use_fused_moe_token_permute_and_unpermute: bool = flag(False, f"The same as {HOST_OPTION}.")


class MoePermuteFusion(Feature):
    """Move tokens to experts and back with fused operators."""

    flags = PermuteFlags
    operators = ("moe_permute_map", "moe_token_unpermute", "sort_chunks")

    def why(self, flags: PermuteFlags, run: RunShape) -> str:
        """Either of the two flags."""
        if flags.use_fused_moe_token_permute_and_unpermute:
            return OPTION
        return HOST_OPTION if run.get("moe_permute_fusion") else ""

    def normalise(self, flags: PermuteFlags, run: RunShape) -> Iterator[Change]:
        """The dispatchers read the host's flag."""
        if flags.use_fused_moe_token_permute_and_unpermute:
            yield Change("moe_permute_fusion", True, f"{OPTION} means it")

    def check(self, flags: PermuteFlags, run: RunShape) -> Iterator[Problem]:
        """Dispatchers and capacities that the operators serve."""
        option = self.why(flags, run)
        if not run.get("num_experts"):
            yield Problem(option, None, "needs --num-experts", f"remove {option}")
        dispatcher = run.get("moe_token_dispatcher_type")
        if dispatcher in ("allgather", "alltoall_seq"):
            rule = f"is not served by --moe-token-dispatcher-type {dispatcher}"
            yield Problem(option, None, rule, "use --moe-token-dispatcher-type alltoall")
        drops = run.get("moe_expert_capacity_factor") is not None and not run.get("moe_pad_expert_input_to_capacity")
        if drops and run.platform == "npu":
            rule = "with --moe-expert-capacity-factor needs --moe-pad-expert-input-to-capacity on NPU"
            yield Problem(option, None, rule, "add --moe-pad-expert-input-to-capacity")
        yield from contradictions("permute", option, run)

    def patches(self, flags: PermuteFlags, host: Any) -> Iterator[Patch]:
        """Three functions of the host, and the names that configs look for."""
        yield wrap(f"{UTILS}:permute", permute, reason="copies tokens to experts with one operator")
        yield wrap(f"{UTILS}:unpermute", unpermute, reason="sums the experts' results with one operator")
        yield wrap(f"{UTILS}:sort_chunks_by_idxs", sort_chunks_by_idxs, reason="reorders chunks without a synchronisation")
        for name, function in NAMES.items():
            put = _how_to_put(host, name)
            if put is not None:
                yield put(f"{UTILS}:{name}", function, reason="configs with moe_permute_fusion look for it")
        yield from configs_say("moe_permute_fusion", _dispatches, host)


def _dispatches(config: Any) -> bool:
    return bool(config.num_moe_experts) and config.moe_token_dispatcher_type in ("alltoall", "flex")


def _how_to_put(host: Any, name: str) -> Callable[..., Patch] | None:
    """Add a name that the host lacks, fill one that is None, leave Transformer Engine's alone."""
    try:
        return set_value if host.load(f"{UTILS}:{name}") is None else None
    except TargetError:
        return add


def permute(
    original: Callable[..., Any],
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Any:
    """Ours when `fused`; the map of rows that it returns is understood by `unpermute` alone."""
    if not fused:
        return original(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
    return moe_routing_map.permute(tokens, routing_map, probs, num_out_tokens, drop_and_pad)


def unpermute(
    original: Callable[..., Tensor],
    permuted_tokens: Tensor,
    sorted_indices: Any,
    restore_shape: Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """Ours when `fused`.

    Raises:
        TypeError: a map of rows that fused code made is given to unfused code, or the other way round.
    """
    if fused:
        return moe_routing_map.unpermute(permuted_tokens, sorted_indices, restore_shape, probs)
    if isinstance(sorted_indices, moe_routing_map.RowMap):
        raise TypeError("unpermute: the map of rows comes from a fused permute; call both with the same value of fused")
    return original(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad)


def sort_chunks_by_idxs(
    original: Callable[..., Any],
    input: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> Any:
    """Ours when `fused`: rows and their weights in the order of chunks `sorted_idxs`."""
    if not fused:
        return original(input, split_sizes, sorted_idxs, probs, fused)
    return sort_chunks(input, split_sizes, sorted_idxs), None if probs is None else sort_chunks(probs, split_sizes, sorted_idxs)


def permute_plain(tokens: Tensor, routing_map: Tensor, num_out_tokens: int | None = None) -> tuple[Tensor, Any]:
    """The call of Transformer Engine without weights."""
    permuted, _, rows = moe_routing_map.permute(tokens, routing_map, None, num_out_tokens)
    return permuted, rows


def permute_with_probs(tokens: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int | None = None) -> Any:
    """The call of Transformer Engine with weights."""
    return moe_routing_map.permute(tokens, routing_map, probs, num_out_tokens)


def unpermute_merging(permuted: Tensor, rows: Any, merging_probs: Tensor | None = None, restore_shape: Any = None) -> Tensor:
    """The call of Transformer Engine; the shape is that of the tokens before."""
    return moe_routing_map.unpermute(permuted, rows, restore_shape or (rows.tensor.shape[0], permuted.shape[1]), merging_probs)


def sort_with_probs(input: Tensor, probs: Tensor, split_sizes: Tensor, sorted_idxs: Tensor) -> tuple[Tensor, Tensor]:
    """The call of Transformer Engine with weights."""
    return sort_chunks(input, split_sizes, sorted_idxs), sort_chunks(probs, split_sizes, sorted_idxs)


NAMES: dict[str, Callable[..., Any]] = {
    "fused_permute": permute_plain,
    "fused_permute_with_probs": permute_with_probs,
    "fused_unpermute": unpermute_merging,
    "fused_sort_chunks_by_index": sort_chunks,
    "fused_sort_chunks_by_index_with_probs": sort_with_probs,
}
