"""When nodes evaluate, counted round by round."""

from __future__ import annotations

import pytest

from conclave.protocol.plan import EvaluationSchedule


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("rounds", [1, 2, 6, 7, 8])
def test_as_many_evaluations_are_paid_for_as_are_due(every, rounds):
    schedule = EvaluationSchedule(every=every)
    due = [schedule.due(number, rounds) for number in range(1, rounds + 1)]
    assert schedule.count(rounds) == sum(due)
    assert due[-1]
