"""Fixtures for tests that run Megatron-LM's own scripts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.launcher import MegatronRuns
from tests.hosts.matrix import Matrix


@pytest.fixture(scope="session")
def checkout() -> Path:
    """A Megatron-LM checkout of core_v0.12.1."""
    place = os.environ.get("MEGATRON_LM_PATH")
    if not place:
        pytest.skip("set MEGATRON_LM_PATH to a Megatron-LM checkout of core_v0.12.1 to run these tests")
    return Path(place)


@pytest.fixture(scope="session")
def runs(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MegatronRuns]:
    """Launcher of Megatron-LM's pretrain_gpt.py with our import line on top."""
    with MegatronRuns(checkout, tmp_path_factory.mktemp("megatron_lm")) as launcher:
        yield launcher


@pytest.fixture(scope="session")
def matrix(runs: MegatronRuns) -> Matrix:
    """Cases of the acceptance table, each run at most once in a session."""
    return Matrix(runs, runs.directory)
