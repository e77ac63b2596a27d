"""Platform cpu for a test that asks for it."""

import pytest

from tests.platform._activated import cpu_activated


@pytest.fixture
def cpu():
    """Platform cpu, active for the time of a test."""
    with cpu_activated() as (platform, _ledger):
        yield platform
