"""Rounding of (q, σ): few enough, all steps kept, and never cheaper than what it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from conclave.privacy.accounting.rdp_curves import rdp_curves
from conclave.privacy.accounting.rounded_pairs import round_pairs


def random_steps(seed, pairs, rates):
    generator = np.random.default_rng(seed)
    return {
        (float(q), float(sigma)): int(n)
        for q, sigma, n in zip(
            generator.choice(rates, pairs),
            generator.uniform(0.8, 4.0, pairs),
            generator.integers(1, 50, pairs),
            strict=True,
        )
    }


RATES = np.random.default_rng(5).uniform(0.01, 0.4, 500)


@pytest.mark.parametrize("cells", [1, 2, 7, 40])
@pytest.mark.parametrize("rates", [RATES, [0.1]])
def test_the_rounded_sequence_costs_at_least_as_much_at_every_order(cells, rates):
    steps = random_steps(1, 200, rates)
    merged, rounding = round_pairs(steps, cells)
    assert len(merged) == rounding.cells <= cells
    assert sum(merged.values()) == sum(steps.values())
    exact, rounded = (np.array(list(s.values()), dtype=float) @ rdp_curves(list(s)) for s in (steps, merged))
    assert np.all(rounded >= exact)


def test_every_step_has_a_dominating_step_of_its_own():
    steps = dict.fromkeys(random_steps(2, 60, RATES), 1)
    merged, rounding = round_pairs(steps, 8)
    stands_for = [pair for pair, count in merged.items() for _ in range(count)]
    fails = np.array([[not (other[0] >= q and other[1] <= sigma) for other in stands_for] for q, sigma in steps])
    assert fails[linear_sum_assignment(fails)].sum() == 0
    assert 0 < rounding.noise < 1 - 0.8 / 4.0
    assert 0 < rounding.rate < max(RATES) / min(RATES)


def test_few_pairs_stay_as_they_are():
    steps = random_steps(3, 10, RATES)
    assert round_pairs(steps, 10) == (steps, None)
    assert round_pairs({}, 10) == ({}, None)


def test_the_stated_steps_are_those_that_were_taken():
    steps = {(0.1, 1.0): 1, (0.1, 0.9): 1, (0.2, 5.0): 1}
    merged, rounding = round_pairs(steps, 2)
    assert merged == {(0.1, 0.9): 2, (0.2, 5.0): 1}
    assert (rounding.pairs, rounding.cells) == (3, 2)
    assert rounding.noise == pytest.approx(0.1)
    assert rounding.rate == 0.0
    assert str(rounding) == "3 distinct (q, σ) rounded to 2: σ down by at most 10 %, q up by at most 0 %"
    assert round_pairs({(0.1, 2.0): 3, (0.15, 1.5): 4}, 1)[0] == {(0.15, 1.5): 7}


def test_more_cells_are_tighter():
    steps = random_steps(4, 1000, RATES)
    costs = []
    for cells in (1, 10, 100, 999):
        merged, _ = round_pairs(steps, cells)
        costs.append(float((np.array(list(merged.values()), dtype=float) @ rdp_curves(list(merged)))[20]))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.1 * costs[0]
