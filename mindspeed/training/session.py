"""The one training run of this process: what the host keeps in global variables, behind the same questions."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mindspeed.errors import MindspeedError

if TYPE_CHECKING:
    from megatron.core.timers import Timers

    from mindspeed.host.events import Events


@dataclass
class Session:
    """State of a run from validated arguments to the last step.

    Attributes:
        args: validated arguments.
        events: subscriptions of active features.
        timers, tokenizer, writer: as in Megatron-LM; `writer` is TensorBoard's, on the last rank only.
        signals: watches SIGTERM and SIGINT; None where the program owns the signals.
        lock: held on the checkpoint folder.
        saves: background checkpoint saves.
        history: points of the loss curve, on the last rank.
        progress: the updating status line, on the last rank of a terminal.
        begun: `time.time()` at the start of the earliest rank.
    """

    args: argparse.Namespace
    events: Events
    timers: Timers | None = None
    tokenizer: Any = None
    writer: Any = None
    signals: Any = None
    lock: Any = None
    saves: Any = None
    history: Any = None
    progress: Any = None
    begun: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class _Slot:
    """Holds the session. Autograd and data loader threads ask too, hence no context variable."""

    session: Session | None = None


def begin(session: Session) -> Session:
    """Install the session of this process.

    Raises:
        MindspeedError: another one is still open.
    """
    if _Slot.session is not None:
        raise MindspeedError("a training run is open in this process already; close it with mindspeed.training.session.end()")
    _Slot.session = session
    return session


def end() -> None:
    """Forget the session; harmless when there is none."""
    _Slot.session = None


def is_open() -> bool:
    """Whether a run is open in this process."""
    return _Slot.session is not None


def current() -> Session:
    """The open session.

    Raises:
        MindspeedError: no run is open.
    """
    if _Slot.session is None:
        raise MindspeedError(
            "no training run is open in this process; it is opened by mindspeed.training.pretraining.pretrain()"
        )
    return _Slot.session


def get_args() -> argparse.Namespace:
    """Arguments of the open run."""
    return current().args


def get_timers() -> Any:
    """Timers of the open run."""
    return current().timers


def get_tensorboard_writer() -> Any:
    """TensorBoard's writer on the last rank, otherwise None."""
    return current().writer


def get_tokenizer() -> Any:
    """Tokenizer of the open run."""
    return current().tokenizer
