"""Budgets that protect nobody: refused, or said."""

from __future__ import annotations

import pytest

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.sensible_budget import check_delta, doubts


@pytest.mark.parametrize(
    ("delta", "units", "refused"),
    [(0.5, 1400, True), (1 / 1400, 1400, True), (0.0007, 1400, False), (1e-5, 100_000, True), (0.5, 1, False)],
)
def test_a_delta_that_gives_a_unit_away_is_refused(delta, units, refused):
    if not refused:
        check_delta(delta, units, where="delta")
        return
    with pytest.raises(BadInputError, match=f"delta is {delta:.3g}.*, must be below 1 / units"):
        check_delta(delta, units, where="delta")


@pytest.mark.parametrize(
    ("epsilon", "delta", "units", "words"),
    [
        (8.0, 1e-5, 1400, []),
        (8.0, 1e-4, 1000, []),
        (8.0, 1.01e-4, 1000, ["delta"]),
        (20.0, 1e-5, 1400, []),
        (21.0, 1e-5, 1400, ["epsilon"]),
        (1e6, 0.5, 1400, ["delta", "epsilon"]),
    ],
)
def test_what_protects_little_is_said(epsilon, delta, units, words):
    assert [sentence.split()[0] for sentence in doubts(epsilon, delta, units)] == words
