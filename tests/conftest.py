"""Fixtures for all tests."""

import pytest
import torch

pytest_plugins = ["mindspeed.testing.fixtures"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU say so instead of failing where there is none, whichever way they were selected."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; scripts/gpu_check.sh runs these")
