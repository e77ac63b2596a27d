"""The host of `mindspeed.enable`: a program with its own training loop on megatron-core."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from mindspeed.errors import ConfigError, Problem, TargetError
from mindspeed.host.events import Events
from mindspeed.host.groups import ParallelGroups
from mindspeed.patching.patch import Patch, wrap
from mindspeed.patching.resolve import load

# What a model or run cannot do without: a default would be a guess, so features learn that it is unknown.
_NO_DEFAULT = frozenset(
    "num_layers hidden_size num_attention_heads seq_length max_position_embeddings micro_batch_size global_batch_size "
    "train_iters train_samples".split()
)
OWNER = "host.program"
# Events that only the program's own loop can know; it fires them with `handle.fire`.
LOOP_EVENTS = ("log_line", "train_begin", "train_end")


class ProgramHost(ParallelGroups):
    """Answers features' questions from megatron-core alone.

    Attributes:
        loop_events: events somebody waits for that the program must fire itself.
    """

    kind = "program"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.events = Events()
        self._watch = _Watch(self.events)

    def target(self, logical: str) -> str:
        """A program has no training loop that could be named.

        Raises:
            TargetError: always, for a logical target.
        """
        if logical.startswith("training:"):
            raise TargetError(f"{logical} does not exist: this program brings its own training loop")
        return logical

    def load(self, target: str) -> Any:
        """The object that a target names."""
        return load(self.target(target))

    @property
    def loop_events(self) -> tuple[str, ...]:
        """Events somebody waits for that the program must fire itself."""
        return tuple(event for event in LOOP_EVENTS if self.events.wanted(event))

    def event_patches(self) -> Iterator[Patch]:
        """Patches of megatron-core that fire the events somebody subscribed to.

        Raises:
            ConfigError: a feature wants to create groups with megatron-core's, which exist already.
        """
        if self.events.wanted("groups_created"):
            parallel_state = importlib.import_module("megatron.core.parallel_state")
            if parallel_state.is_initialized():
                rule = "creates process groups together with Megatron's, which exist already"
                fix = "call mindspeed.enable before initialize_model_parallel"
                raise ConfigError([Problem("mindspeed.enable", None, rule, fix)])
        for events, target, advice in self._watch.points():
            if any(self.events.wanted(event) for event in events):
                reason = f"fires {', '.join(events)}"
                yield dataclasses.replace(wrap(target, advice, reason=reason), owner=OWNER)


class _Watch:
    """Advices around functions of megatron-core that tell the moments of a run."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._announced: list[weakref.ref[Any]] = []
        self._steps = 0
        self._in_step = False

    def points(self) -> Iterator[tuple[tuple[str, ...], str, Callable[..., Any]]]:
        """(events, target, advice that fires them)."""
        parallel_state, core = "megatron.core.parallel_state", "megatron.core"
        yield ("groups_created",), f"{parallel_state}:initialize_model_parallel", self._after("groups_created")
        yield ("groups_destroyed",), f"{parallel_state}:destroy_model_parallel", self._after("groups_destroyed")
        wrapper = f"{core}.distributed.distributed_data_parallel:DistributedDataParallel.__init__"
        yield ("model_built",), wrapper, self._model_is_wrapped
        yield ("model_built", "optimizer_built"), f"{core}.optimizer:get_megatron_optimizer", self._optimizer
        for schedule in (
            "forward_backward_no_pipelining",
            "forward_backward_pipelining_with_interleaving",
            "forward_backward_pipelining_without_interleaving",
        ):
            yield ("step_begin", "step_end"), f"{core}.pipeline_parallel.schedules:{schedule}", self._schedule
        for kind in ("MixedPrecisionOptimizer", "FP32Optimizer", "ChainedOptimizer"):
            yield ("step_end", "step_begin"), f"{core}.optimizer.optimizer:{kind}.step", self._optimizer_step
        yield ("checkpoint_save", "checkpoint_saved"), f"{core}.dist_checkpointing.serialization:save", self._save
        yield ("checkpoint_load",), f"{core}.dist_checkpointing.serialization:load", self._load

    def _after(self, event: str) -> Callable[..., Any]:
        def advice(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._events.fire(event)
            return result

        return advice

    def _announce(self, chunks: Iterable[Any]) -> None:
        """Tell of model chunks that nobody was told of."""
        new = [chunk for chunk in chunks if not any(chunk is known() for known in self._announced)]
        if new:
            self._announced += map(weakref.ref, new)
            self._events.fire("model_built", model=new)

    def _model_is_wrapped(self, original: Callable[..., Any], ddp: Any, *args: Any, **kwargs: Any) -> Any:
        self._announce([kwargs["module"] if "module" in kwargs else args[2]])
        return original(ddp, *args, **kwargs)

    def _optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chunks = kwargs["model_chunks"] if "model_chunks" in kwargs else args[1]
        self._announce(getattr(chunk, "module", chunk) if _is_ddp(chunk) else chunk for chunk in chunks)
        optimizer = original(*args, **kwargs)
        self._events.fire("optimizer_built", optimizer=optimizer, model=chunks)
        return optimizer

    def _schedule(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("forward_only", False) and not self._in_step:
            self._in_step = True
            self._events.fire("step_begin", iteration=self._steps)
        return original(*args, **kwargs)

    def _optimizer_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._in_step = False
        self._events.fire("step_end", iteration=self._steps)
        self._steps += 1
        return result

    def _save(self, original: Callable[..., Any], state: Any, directory: Any, *args: Any, **kwargs: Any) -> Any:
        iteration = state.get("iteration", self._steps)
        self._events.fire("checkpoint_save", iteration=iteration, state=state)
        request = original(state, directory, *args, **kwargs)
        told = {"iteration": iteration, "directory": directory}
        if request is None:
            self._events.fire("checkpoint_saved", **told)
        else:  # asynchronous: complete when the writer says so
            request.add_finalize_fn(lambda: self._events.fire("checkpoint_saved", **told))
        return request

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        state = result[0] if isinstance(result, tuple) else result
        self._events.fire("checkpoint_load", iteration=state.get("iteration", self._steps), state=state)
        return result


def _is_ddp(chunk: Any) -> bool:
    return type(chunk).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "TorchFullyShardedDataParallel")


def run_args(config: Any, flags: Mapping[str, Any], own: Collection[str]) -> argparse.Namespace:
    """Arguments of a run from whatever a program has: Megatron's defaults, then `config`, then `flags`.

    Args:
        config: argparse.Namespace, mapping of flag names (dashes or underscores), TransformerConfig, or None.
        flags: further values by name.
        own: destinations of the features' flags.

    Raises:
        ConfigError: names that neither Megatron nor a feature has, each with the nearest one.
        TypeError: `config` is of another kind.
    """
    values: dict[str, Any] = {}
    defaults = host_defaults()
    if isinstance(config, argparse.Namespace):
        values.update(vars(config))
    elif isinstance(config, Mapping):
        values.update(_known(config, {*own, *defaults}))
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        values.update(from_config(config))
    elif config is not None:
        raise TypeError(
            f"mindspeed.enable takes a namespace, a dict, a TransformerConfig or keywords, not {type(config).__name__}"
        )
    values.update(_known(flags, {*own, *defaults}))
    values.pop("mindspeed", None)
    given = frozenset(values) if not isinstance(config, argparse.Namespace) else frozenset(flags)
    known_defaults = {name: value for name, value in defaults.items() if name not in _NO_DEFAULT}
    return argparse.Namespace(**{**known_defaults, "given_flags": sorted(given), **values})


def _known(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        dest = str(name).lstrip("-").replace("-", "_")
        if dest not in names:
            near = difflib.get_close_matches(dest, sorted(names), n=3)
            fix = f"did you mean {' or '.join(near)}" if near else "`mindspeed features` lists all flags"
            problems.append(Problem(str(name), None, "is not a flag of Megatron or of a feature", fix))
        read[dest] = value
    if problems:
        raise ConfigError(problems)
    return read


def host_defaults() -> dict[str, Any]:
    """Megatron-LM's arguments with their defaults; those of flags the trainer lacks are None or False, i.e. off."""
    from mindspeed.training.arguments import host_only_flags
    from mindspeed.training.flag_table import every_flag

    defaults: dict[str, Any] = {option.lstrip("-").replace("-", "_"): None for option in host_only_flags()}
    defaults.update((spec.dest, spec.default) for spec in every_flag())
    config = load("megatron.core.transformer.transformer_config:TransformerConfig")
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING and not field.name.startswith("_"):
            defaults.setdefault(field.name, field.default)
    defaults.setdefault("world_size", None)
    return defaults


def from_config(config: Any) -> dict[str, Any]:
    """Arguments that a TransformerConfig (or a subclass of it) states, under the names of Megatron's flags."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if not field.name.startswith("_")}
    renamed = {"num_moe_experts": "num_experts", "layernorm_epsilon": "norm_epsilon"}
    for ours, theirs in renamed.items():
        if ours in values:
            values[theirs] = values[ours]
    if "num_query_groups" in values:
        values["group_query_attention"] = values["num_query_groups"] not in (None, values.get("num_attention_heads"))
    if "add_bias_linear" in values:
        values["disable_bias_linear"] = not values["add_bias_linear"]
    activation = getattr(values.get("activation_func"), "__name__", "")
    values["swiglu"] = bool(values.get("gated_linear_unit")) and activation in ("silu", "swish")
    return values
