"""The acceptance table: Megatron-LM's own script, one import line, every layout gives the same curve."""

import pytest

from tests.hosts.cases import EVERY_CHANGE, all_cases

pytestmark = [pytest.mark.megatron_lm, pytest.mark.timeout(600)]
OTHERS = [name for name in all_cases() if name not in EVERY_CHANGE]


@pytest.mark.parametrize("name", EVERY_CHANGE)
def test_case(matrix, name):
    outcome = matrix.outcome(name)
    assert outcome.ok, f"{outcome.complaint}\n{outcome.detail}"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_further_case(matrix, name):
    outcome = matrix.outcome(name)
    assert outcome.ok, f"{outcome.complaint}\n{outcome.detail}"


def test_names_are_known_and_references_exist():
    cases = all_cases()
    assert set(EVERY_CHANGE) <= set(cases)
    assert all(case.like in cases for case in cases.values() if case.like)


@pytest.mark.slow
def test_skipped_steps_of_fp16_are_in_the_curve_s_gap(matrix):
    outcome = matrix.outcome("fp16 with overflow steps")
    first = min(outcome.curve)
    assert first > 1, "the first steps overflow, are skipped and print no loss"
    assert outcome.ok, outcome.complaint
