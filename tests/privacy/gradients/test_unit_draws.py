"""Poisson sampling."""

from __future__ import annotations

import torch
from scipy import stats

from conclave.privacy.gradients.unit_draws import poisson_sample
from conclave.privacy.randomness import derive

SECRET = derive(bytes(32), "sampling test")


def test_batch_sizes_are_binomial_and_vary():
    # Two-sided tail of 1e-6 for the total, and for the variance by its χ² statistic: false alarm ≤ 2e-6.
    units, rate, steps = 400, 0.1, 500
    sizes = torch.tensor([len(poisson_sample(units, rate, SECRET, step)) for step in range(steps)]).double()
    total = stats.binom(units * steps, rate)
    assert total.ppf(5e-7) <= sizes.sum() <= total.ppf(1 - 5e-7)
    statistic = float(((sizes - units * rate) ** 2).sum() / (units * rate * (1 - rate)))
    assert stats.chi2(steps).ppf(5e-7) <= statistic <= stats.chi2(steps).ppf(1 - 5e-7)


def test_each_unit_enters_at_the_rate_and_independently_across_steps():
    units, rate, steps = 50, 0.3, 2000
    entered = torch.zeros(steps, units)
    for step in range(steps):
        entered[step, poisson_sample(units, rate, SECRET, step)] = 1.0
    bound = stats.binom(steps, rate)
    # 50 units, two tails of 1e-8 each: false alarm ≤ 1e-6.
    assert all(bound.ppf(1e-8) <= count <= bound.ppf(1 - 1e-8) for count in entered.sum(0).tolist())
    lagged = torch.corrcoef(torch.stack([entered[:-1].flatten(), entered[1:].flatten()]))[0, 1]
    assert abs(float(lagged)) < 5 / (steps * units) ** 0.5


def test_adding_a_unit_moves_no_other_unit():
    for step in range(20):
        small = poisson_sample(100, 0.4, SECRET, step).tolist()
        assert [unit for unit in poisson_sample(101, 0.4, SECRET, step).tolist() if unit < 100] == small


def test_edges():
    assert poisson_sample(5, 1.0, SECRET, 0).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(0, 0.5, SECRET, 0).tolist() == []
    assert poisson_sample(1000, 1e-300, SECRET, 0).tolist() == []
