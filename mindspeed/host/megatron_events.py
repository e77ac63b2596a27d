"""How each event of `mindspeed.host.events` is fired from Megatron-LM: one patch per event, made on demand.

`checkpoint_saved` is fired by `mindspeed.host.megatron_checkpoints`, which knows when a save is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mindspeed.patching.patch import Patch, wrap

if TYPE_CHECKING:
    from mindspeed.host.megatron import MegatronHost

Advice = Callable[..., Any]


def event_patches(host: MegatronHost) -> Iterator[Patch]:
    """Patches for the events that are wanted; targets may be logical."""
    for event, (target, make) in FIRED_BY.items():
        if host.events.wanted(event):
            yield wrap(target, make(host), reason=f"fires the event {event}")


def _after_call(host: MegatronHost, event: str) -> Advice:
    """Fire an event without details when the original has returned."""

    def advice(original: Advice, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        host.events.fire(event)
        return result

    return advice


def _before_call(host: MegatronHost, event: str) -> Advice:
    """Fire an event without details before the original runs."""

    def advice(original: Advice, *args: Any, **kwargs: Any) -> Any:
        host.events.fire(event)
        return original(*args, **kwargs)

    return advice


def _model_built(host: MegatronHost) -> Advice:
    """The host calls this function once in `get_model`, on the complete list, just before wrapping for DP."""

    def correct_amax_history(original: Advice, model: Any) -> Any:
        result = original(model)
        host.events.fire("model_built", model=[_without_precision_wrapper(chunk) for chunk in model])
        return result

    return correct_amax_history


def _without_precision_wrapper(chunk: Any) -> Any:
    return chunk.module if type(chunk).__name__ == "Float16Module" else chunk


def _optimizer_built(host: MegatronHost) -> Advice:
    def get_megatron_optimizer(original: Advice, config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(config, model_chunks, *args, **kwargs)
        host.events.fire("optimizer_built", optimizer=optimizer, model=model_chunks)
        return optimizer

    return get_megatron_optimizer


def _iteration(host: MegatronHost) -> int:
    """Steps done before the one under way, as the host counts them."""
    return int(getattr(host.args, "curr_iteration", None) or getattr(host.args, "iteration", 0) or 0)


def _step_begin(host: MegatronHost) -> Advice:
    def train_step(original: Advice, *args: Any, **kwargs: Any) -> Any:
        host.events.fire("step_begin", iteration=_iteration(host))
        return original(*args, **kwargs)

    return train_step


def _step_end(host: MegatronHost) -> Advice:
    def train_step(original: Advice, *args: Any, **kwargs: Any) -> Any:
        iteration = _iteration(host)
        result = original(*args, **kwargs)
        host.events.fire("step_end", iteration=iteration)
        return result

    return train_step


def _log_line(host: MegatronHost) -> Advice:
    def training_log(original: Advice, loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        metrics = dict(loss_dict)
        host.events.fire("log_line", metrics=metrics)
        return original(metrics, *args, **kwargs)

    return training_log


def _checkpoint_save(host: MegatronHost) -> Advice:
    """`generate_state_dict` also makes the template of a load; only a save names its iteration."""

    def generate_state_dict(original: Advice, *args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        if kwargs.get("iteration") is not None:
            host.events.fire("checkpoint_save", iteration=kwargs["iteration"], state=state)
        return state

    return generate_state_dict


def _checkpoint_load(host: MegatronHost) -> Advice:
    def load_base_checkpoint(original: Advice, load_dir: Any, args: Any, rank0: bool = False, **kwargs: Any) -> Any:
        result = original(load_dir, args, rank0=rank0, **kwargs)
        state = result[0]
        if not rank0 and state is not None:
            host.events.fire("checkpoint_load", iteration=int(state.get("iteration") or 0), state=state)
        return result

    return load_base_checkpoint


# event -> (target, maker of the advice)
FIRED_BY: dict[str, tuple[str, Callable[[MegatronHost], Advice]]] = {
    "groups_created": ("megatron.core.parallel_state:initialize_model_parallel", lambda h: _after_call(h, "groups_created")),
    "groups_destroyed": ("megatron.core.parallel_state:destroy_model_parallel", lambda h: _before_call(h, "groups_destroyed")),
    "model_built": ("megatron.core.fp8_utils:correct_amax_history_if_needed", _model_built),
    "optimizer_built": ("megatron.core.optimizer:get_megatron_optimizer", _optimizer_built),
    "step_begin": ("training:train_step", _step_begin),
    "step_end": ("training:train_step", _step_end),
    "log_line": ("training:training_log", _log_line),
    "checkpoint_save": ("training:generate_state_dict", _checkpoint_save),
    "checkpoint_load": ("training:_load_base_checkpoint", _checkpoint_load),
    "train_begin": ("training:train", lambda h: _before_call(h, "train_begin")),
    "train_end": ("training:train", lambda h: _after_call(h, "train_end")),
}
