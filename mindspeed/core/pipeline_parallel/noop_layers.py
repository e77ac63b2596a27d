"""Noop layers: leave chosen layer slots empty so that pipeline stages carry equal work.

A position keeps its number: `--num-layers 8 --noop-layers 0,7` is a model of six layers, numbered 2 to 7,
on slots that are dealt to pipeline stages as if there were eight. An empty slot has no parameters, draws
no random number and costs nothing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mindspeed.patching import Feature, Patch, Problem, RunShape, flag, wrap

# --- the method: no host, no device ---------------------------------------------------------------------


def parse_positions(text: str) -> frozenset[int]:
    """Positions in a list such as `0, 5, 120-127` (0-based, ranges include both ends, blanks allowed).

    Raises:
        ValueError: an item is neither a number nor a rising range.
    """
    positions: set[int] = set()
    for item in text.replace(" ", "").split(","):
        first, dash, last = item.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{item!r} is neither a position nor a range")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise ValueError(f"the range {item!r} falls")
        positions.update(range(int(first), stop + 1))
    return frozenset(positions)


def real_positions(total: int, empty: Iterable[int]) -> list[int]:
    """Positions that hold a layer, in order; the index in this list is the layer's number without the gaps."""
    gaps = frozenset(empty)
    return [position for position in range(total) if position not in gaps]


def moe_pattern(total: int, frequency: int | list[int]) -> list[int]:
    """1 for each position with a mixture-of-experts layer, from a frequency or a pattern of length `total`."""
    if isinstance(frequency, int):
        return [int(position % frequency == 0) for position in range(total)]
    return list(frequency)


class NoopLayer(torch.nn.Module):
    """Stands in an empty slot: hands `hidden_states` [s, b, h] and `context` on unchanged.

    Args:
        layer_number: 1-based number inside this chunk.
        offset: position of the chunk's first slot.
        copies: return a copy. The only layers of a chunk must not hand on the very tensor that was
            received: the schedule frees a chunk's output after sending it.
    """

    def __init__(self, config: Any, layer_number: int, *, offset: int = 0, copies: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer_number = offset + layer_number
        self.copies = copies

    def forward(self, hidden_states: Tensor, *_: Any, context: Tensor | None = None, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Return the inputs; everything else that layers are given is ignored."""
        return hidden_states.clone() if self.copies else hidden_states, context

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing to save."""
        return {}


@dataclass(frozen=True)
class NoopSpec:
    """What the host's module builder needs to make a `NoopLayer`."""

    params: dict[str, Any]
    module: type = NoopLayer


def with_gaps(specs: list[Any], offset: int, empty: frozenset[int]) -> list[Any]:
    """Layer specs of a chunk whose first slot is position `offset`, with the empty slots taken out."""
    is_empty = [offset + index in empty for index in range(len(specs))]
    needs_copy = all(is_empty)
    return [
        NoopSpec({"offset": offset, "copies": needs_copy and index == 0}) if gap else spec
        for index, (spec, gap) in enumerate(zip(specs, is_empty, strict=True))
    ]


# --- the declaration -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoopFlags:
    """Flags of `NoopLayers`."""

    noop_layers: str | None = flag(
        None, "Layer positions to leave empty, 0-based, such as 0,7 or 0,120-127; --num-layers counts them.", metavar="LIST"
    )


class NoopLayers(Feature):
    """Leave chosen layer slots empty so that pipeline stages carry equal work."""

    flags = NoopFlags

    def check(self, flags: NoopFlags, run: RunShape) -> Iterator[Problem]:
        """Positions must be readable, inside the model, and leave a layer to train."""
        total = run.num_layers
        try:
            empty = parse_positions(flags.noop_layers or "")
        except ValueError as error:
            yield Problem("--noop-layers", flags.noop_layers, str(error), "list 0-based positions such as 0,7 or 0,120-127")
            return
        if outside := sorted(position for position in empty if position >= total):
            yield Problem(
                "--noop-layers",
                flags.noop_layers,
                f"position {', '.join(map(str, outside))} is outside --num-layers {total} (multi-token-prediction layers have no slots)",
                f"use positions 0 to {total - 1}",
            )
        elif len(empty) == total:
            yield Problem("--noop-layers", flags.noop_layers, f"leaves none of --num-layers {total} to train", "keep a layer")

    def patches(self, flags: NoopFlags, host: Any) -> Iterator[Patch]:
        """Build blocks with gaps; count, name and save only the layers that exist."""
        empty = parse_positions(flags.noop_layers or "")
        block = "megatron.core.transformer.transformer_block:TransformerBlock"
        offset_of = host.load("megatron.core.transformer.transformer_layer:get_transformer_layer_offset")
        yield wrap(f"{block}._build_layers", _build_with_gaps(empty, offset_of), reason="builds nothing in an empty slot")
        yield wrap(f"{block}.sharded_state_dict", _name_real_layers(empty), reason="names layers without the gaps")
        yield wrap(
            "megatron.core.transformer.transformer_layer:TransformerLayer.sharded_state_dict",
            _place_real_layer(empty),
            reason="saves layers on an axis without gaps",
        )
        flops = "training:num_floating_point_operations"
        yield wrap(flops, _flops_of_real(empty), reason="empty slots compute nothing", optional=True)
        yield wrap(
            "megatron.core.transformer.moe.moe_utils:track_moe_metrics",
            _mean_over_real(empty),
            reason="averages the auxiliary loss over layers that exist",
        )

    def subscribe(self, flags: NoopFlags, host: Any) -> None:
        """Make `torch_dist` checkpoints state the number of layers that they contain."""
        empty = parse_positions(flags.noop_layers or "")
        if getattr(host.args, "ckpt_format", "torch_dist") == "torch_dist":
            host.events.on("checkpoint_save", lambda iteration, state: _count_without_gaps(state, len(empty)))
        host.events.on("checkpoint_args", lambda saved: _count_with_gaps(saved, len(empty)))


def _build_with_gaps(empty: frozenset[int], offset_of: Callable[[Any], int]) -> Callable[..., None]:
    def build_layers(original: Callable[[Any], None], block: Any) -> None:
        specs = with_gaps(list(block.submodules.layer_specs), offset_of(block.config), empty)
        block.submodules = replace(block.submodules, layer_specs=specs)
        original(block)

    return build_layers


def _place_real_layer(empty: frozenset[int]) -> Callable[..., dict[str, Any]]:
    def sharded_state_dict(
        original: Callable[..., dict[str, Any]], layer: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        total, position = layer.config.num_layers, layer.layer_number - 1
        # Layers of other stacks (multi-token prediction) are placed on axes of other lengths.
        if list(sharded_offsets) == [(0, position, total)]:
            real = real_positions(total, empty)
            sharded_offsets = [(0, real.index(position), len(real))]
        return original(layer, prefix, sharded_offsets, metadata)

    return sharded_state_dict


def _name_real_layers(empty: frozenset[int]) -> Callable[..., dict[str, Any]]:
    def sharded_state_dict(original: Callable[..., Any], block: Any, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        state = original(block, prefix, *args, **kwargs)
        real = real_positions(block.config.num_layers, empty)
        renamed = {f"{prefix}layers.{position}.": f"{prefix}layers.{index}." for index, position in enumerate(real)}
        for sharded in state.values():
            # Only stacks of unlike layers carry a number in the name; the others use an axis.
            head = next((old for old in renamed if getattr(sharded, "key", "").startswith(old)), None)
            if head:
                sharded.key = renamed[head] + sharded.key.removeprefix(head)
        return state

    return sharded_state_dict


def _flops_of_real(empty: frozenset[int]) -> Callable[..., float]:
    def num_floating_point_operations(original: Callable[..., float], args: Any, batch_size: int) -> float:
        real = real_positions(args.num_layers, empty)
        compact = copy.copy(args)
        if getattr(args, "num_experts", None) is not None:
            pattern = moe_pattern(args.num_layers, args.moe_layer_freq)
            compact.moe_layer_freq = [pattern[position] for position in real]
        compact.num_layers = len(real)
        return original(compact, batch_size)

    return num_floating_point_operations


def _mean_over_real(empty: frozenset[int]) -> Callable[..., Any]:
    def track_moe_metrics(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs)
        total, frequency = call.arguments.get("num_layers"), call.arguments.get("moe_layer_freq")
        if total is not None:
            pattern = moe_pattern(total, 1 if frequency is None else frequency)
            call.arguments["moe_layer_freq"] = [0 if position in empty else moe for position, moe in enumerate(pattern)]
        return original(*call.args, **call.kwargs)

    return track_moe_metrics


def _count_without_gaps(state: dict[str, Any], gaps: int) -> None:
    """Save the number of real layers, in a copy of the arguments: the run's own stay as they are."""
    if "args" in state:
        state["args"] = copy.copy(state["args"])
        state["args"].num_layers -= gaps


def _count_with_gaps(saved: Any, gaps: int) -> None:
    """Read the saved number of layers as that of this run's positions; files per rank hold positions already."""
    if getattr(saved, "ckpt_format", "torch_dist") == "torch_dist":
        saved.num_layers += gaps
