"""The layout of the micro batch that is being computed, visible to rotary embeddings and core attention.

Recomputation runs later and in another thread: whatever re-runs or delays part of a forward captures the scope with
`current_layout()` and opens it again. Backward functions keep what they need themselves and never look here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mindspeed.core.context_parallel.layout import SequenceLayout


class _Stack(threading.local):
    """Layouts of the scopes that this thread has open."""

    def __init__(self) -> None:
        self.layouts: list[SequenceLayout | None] = []


_open = _Stack()


@contextmanager
def layout_scope(layout: SequenceLayout | None) -> Iterator[None]:
    """Make `layout` current for the block; scopes nest."""
    _open.layouts.append(layout)
    try:
        yield
    finally:
        _open.layouts.pop()


def current_layout() -> SequenceLayout | None:
    """Layout of the innermost open scope, None outside."""
    return _open.layouts[-1] if _open.layouts else None


def scope_is_open() -> bool:
    """Whether a scope is open, with a layout or without one."""
    return bool(_open.layouts)
