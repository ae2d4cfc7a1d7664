"""When nodes evaluate, counted round by round."""

from __future__ import annotations

import pytest

from conclave.privacy.releases.evaluation_config import EvaluationConfig, EvaluationPlan


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("rounds", [1, 2, 6, 7, 8])
def test_as_many_evaluations_are_paid_for_as_are_due(every, rounds):
    schedule = EvaluationConfig(every=every)
    due = [schedule.due(number, rounds) for number in range(1, rounds + 1)]
    assert schedule.count(rounds) == sum(due)
    assert due[-1]


def test_every_held_out_unit_takes_part_in_an_evaluation():
    mechanism = EvaluationPlan(every=2, noise_multiplier=3.0).mechanism
    assert mechanism is not None
    assert (mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.steps) == (1.0, 3.0, 1)
    assert EvaluationPlan(every=2, noise_multiplier=None).mechanism is None
