"""Level 0 for the time of a block, on a ledger of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mindspeed.host import level0
from mindspeed.patching.ledger import Ledger


@contextlib.contextmanager
def level0_active() -> Iterator[Ledger]:
    """Platform and repairs on; everything is undone at the end."""
    ledger = Ledger()
    try:
        level0.activate(ledger)
        yield ledger
    finally:
        ledger.revert()
