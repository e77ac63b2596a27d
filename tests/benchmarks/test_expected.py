"""Counted figures are those that were accepted last, and no feature goes unmeasured."""

from __future__ import annotations

import pytest

from benchmarks._case import cases_of, groups
from benchmarks._expected import accepted, counted, exact_cases
from mindspeed.patching.discovery import all_features

CASES = {case.id: case for case in exact_cases()}
ONLY_NAMES = {"latent-attention-names"}
"""Other spellings of the host's own flags: there is nothing to measure."""


@pytest.mark.counted
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (case.preset == "full")) for name, case in CASES.items()]
)
def test_counted_figure_is_the_accepted_one(case):
    assert counted(CASES[case]) == accepted()[case], "if this is meant: python -m benchmarks._expected, and say why"


def test_accepted_figures_belong_to_cases():
    assert set(accepted()) == set(CASES)


def test_every_feature_has_a_case():
    measured = {case.feature for case in cases_of(module for found in groups().values() for module in found)}
    assert {feature.name for feature in all_features()} - measured == ONLY_NAMES
