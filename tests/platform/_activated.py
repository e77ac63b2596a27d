"""Platform cpu, active for the time of a block."""

import contextlib

from mindspeed.patching.ledger import Ledger
from mindspeed.platform.cpu import Cpu


@contextlib.contextmanager
def cpu_activated(without=()):
    """Yields the platform and its ledger; `without` names targets that are reverted at once, for negative tests."""
    platform, ledger = Cpu(), Ledger()
    platform.activate(ledger)
    try:
        if without:
            rows = [row for row in ledger.rows if row.target in without]
            assert len(rows) == len(without), f"not all of {without} are patched"
            ledger.revert_rows(rows)
        yield platform, ledger
    finally:
        ledger.revert()
