"""Operator tests run single-threaded from a fixed seed, with uninitialised memory filled with NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed_and_nan_memory():
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
