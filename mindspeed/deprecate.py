"""`with NoExecuteFunction(): import mindspeed.megatron_adaptor` imports the names without acting."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

_suspended = contextvars.ContextVar("mindspeed_suspended", default=False)


def is_suspended() -> bool:
    """Whether an import is under way that shall have no effect."""
    return _suspended.get()


class NoExecuteFunction:
    """Block in which functions marked with `AutoExecuteFunction` do not run by themselves."""

    def __enter__(self) -> NoExecuteFunction:
        self._token = _suspended.set(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _suspended.reset(self._token)


class AutoExecuteFunction:
    """Decorator: run the function where it is defined, unless suspended; it can be called again."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        functools.update_wrapper(self, function)
        if not is_suspended():
            function()

    def __call__(self) -> Any:
        """Run the function."""
        return self._function()
