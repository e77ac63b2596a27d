"""pytest plugin: `pytest_plugins = ["mindspeed.testing.fixtures"]` in the top conftest.py.

Offers the fixture `uninitialised_memory_is_nan` (on for every test), fixed seeds, one thread, and the end of the worker
pools with the session. A test that must see torch's own defaults carries `@pytest.mark.plain_memory`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from mindspeed.testing.pool import pools
from mindspeed.testing.worker import SEED

if TYPE_CHECKING:
    from _pytest.config import Config


def pytest_configure(config: Config) -> None:
    """Declare our mark, and let operators without a deterministic form run as they are."""
    config.addinivalue_line("markers", "plain_memory: leave uninitialised memory as torch gives it")
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation.*:UserWarning")


def pytest_sessionfinish() -> None:
    """End all worker processes."""
    if pools.cache_info().currsize:
        pools().close()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill `torch.empty` and its like with NaN (integers: the largest value), here and in the ranks of the test."""
    wanted = request.node.get_closest_marker("plain_memory") is None
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers for every test, whatever ran before it."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tests run beside each other on small machines; more threads would only disturb."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
