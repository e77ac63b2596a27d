"""Moments of a run that several features care about; the host layer fires them, features subscribe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

# name -> keyword arguments that handlers receive
EVENTS: dict[str, str] = {
    "groups_created": "()  all of the host's process groups exist; create further ones here",
    "groups_destroyed": "()  the host dropped its groups; drop yours",
    "model_built": "(model)  list of model chunks of this rank, before they are wrapped for data parallelism",
    "optimizer_built": "(optimizer, model)  optimizer and the (wrapped) model chunks",
    "step_begin": "(iteration)  before the first forward of a training step",
    "step_end": "(iteration)  after the optimizer step",
    "log_line": "(metrics)  dict of what is about to be logged; handlers may add entries",
    "checkpoint_save": "(iteration, state)  state dict about to be written; handlers may add `mindspeed.<feature>` keys",
    "checkpoint_saved": "(iteration, directory)  the checkpoint is complete on disk",
    "checkpoint_load": "(iteration, state)  state dict just read",
    "checkpoint_args": "(saved)  arguments of a checkpoint, before they are compared with the run's; handlers may translate them",
    "train_begin": "()  just before the first step",
    "train_end": "()  after the last step",
    "reverted": "()  every change of this process was undone; forget what belonged to the run",
}


class Events:
    """Subscriptions of one activation; handlers run in the order of subscription."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Callable[..., Any]]] = defaultdict(list)
        self._shared: dict[str, Any] = {}

    def shared(self, key: str, make: Callable[[], Any]) -> Any:
        """State that subscriptions and patches of one activation share; made at the first request, dropped by `clear`."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def on(self, event: str, handler: Callable[..., Any]) -> None:
        """Call `handler` with the event's keyword arguments whenever `event` fires."""
        if event not in EVENTS:
            raise KeyError(f"no event {event!r}; there are {', '.join(EVENTS)}")
        self._handlers[event].append(handler)

    def wanted(self, event: str) -> bool:
        """Whether anybody subscribed, so that a host may skip the patch that would fire it."""
        return bool(self._handlers.get(event))

    def fire(self, event: str, **details: Any) -> None:
        """Run all handlers of `event`."""
        if event not in EVENTS:
            raise KeyError(f"no event {event!r}; there are {', '.join(EVENTS)}")
        for handler in tuple(self._handlers.get(event, ())):
            handler(**details)

    def subscriptions(self) -> dict[str, tuple[Callable[..., Any], ...]]:
        """Present handlers by event, to be given to `restore`."""
        return {event: tuple(handlers) for event, handlers in self._handlers.items()}

    def restore(self, subscriptions: dict[str, tuple[Callable[..., Any], ...]]) -> None:
        """Go back to earlier subscriptions."""
        self._handlers.clear()
        self._handlers.update({event: list(handlers) for event, handlers in subscriptions.items()})

    def clear(self) -> None:
        """Forget all subscriptions and what they share."""
        self._handlers.clear()
        self._shared.clear()
