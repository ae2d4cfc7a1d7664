"""The bound between whole orders, against the divergence integrated numerically and against closed forms."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from dp_accounting import pld
from scipy.special import logsumexp

from conclave.privacy.accounting.calibration import calibrate_noise
from conclave.privacy.accounting.filter import UNITS_PER_NAT, budget_units, fixed_order
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.accounting.order_bound import rdp_bound
from conclave.privacy.accounting.prices import charge_units, rdp_at
from conclave.privacy.accounting.rdp_curves import ORDERS, rdp_curves

DELTA = 1e-5


def step(q, sigma, steps=1):
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps)


def bound(q, sigma, order):
    return float(rdp_bound(np.array([q]), np.array([sigma]), [order])[0, 0])


@cache
def divergence(q, sigma, order):
    """The Rényi divergence of a sampled Gaussian: E[φ(X)] over N(0, σ²), by the trapezoid rule, which is exact here."""
    x = np.linspace(-12.0 * sigma - 1.0, 12.0 * sigma + order + 1.0, 6_001)
    exponent = (2.0 * x - 1.0) / (2.0 * sigma**2)
    change = q * np.expm1(np.minimum(exponent, 700.0))
    log_power = order * np.logaddexp(math.log1p(-q), math.log(q) + exponent)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        series = 1.0  # of φ = (1 + X)^α − 1 − αX, which cancels where X is small
        for n in range(9, 2, -1):
            series = 1.0 + (order - n + 1.0) / n * change * series
        log_small = np.log(0.5 * order * (order - 1.0) * change**2 * series)
        log_middle = np.log(np.expm1(log_power) - order * change)
        log_phi = np.where(np.abs(change) < 1e-2, log_small, np.where(log_power > 300.0, log_power, log_middle))
    log_density = -(x**2) / (2.0 * sigma**2) - math.log(sigma * math.sqrt(2.0 * math.pi))
    return np.logaddexp(0.0, logsumexp(log_phi + log_density) + math.log(x[1] - x[0])) / (order - 1.0)


GRID = list(
    itertools.product(
        (1e-9, 1e-6, 1e-3, 0.05, 0.3, 0.5, 0.9, 1 - 1e-6),
        (0.3, 0.7, 1.5, 3.0, 10.0, 100.0, 1e5),
        (1.01, 1.1, 1.5, 1.9, 2.0, 2.4, 3.4, 6.5, 15.3, 27.0, 60.7),
    )
)


def test_no_charge_is_below_the_divergence():
    for q, sigma, order in GRID:
        exact = divergence(q, sigma, order)
        assert bound(q, sigma, order) >= exact * (1.0 - 1e-9), (q, sigma, order)
        assert charge_units(step(q, sigma), order) >= exact * UNITS_PER_NAT, (q, sigma, order)


def test_from_order_two_up_no_price_is_two_percent_above_the_divergence():
    for q, sigma, order in GRID:
        exact = divergence(q, sigma, order)
        if order >= 2.0 and exact > 1e-12:
            assert rdp_at(step(q, sigma), order) <= 1.02 * exact, (q, sigma, order)


@pytest.mark.parametrize("sigma", [10.0, 100.0, 1e9])
@pytest.mark.parametrize(("order", "most"), [(1.01, 1.08), (1.4, 1.05), (1.9, 1.01)])
def test_between_order_one_and_two_much_noise_is_cheap(sigma, order, most):
    for q in (1e-9, 1e-3, 0.01, 0.1):
        to_first_order = q * q * order / (2 * sigma**2)
        assert to_first_order <= bound(q, sigma, order) <= most * to_first_order


@pytest.mark.parametrize("q", [1e-9, 1e-4, 0.3, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 40.0, 1e9])
def test_orders_two_and_three_are_their_closed_forms(q, sigma):
    once, thrice = (min(n / sigma**2, 700.0) for n in (1, 3))
    assert bound(q, sigma, 2.0) == pytest.approx(math.log1p(q * q * math.expm1(once)), rel=1e-12)
    three = math.log1p(3 * q * q * (1 - q) * math.expm1(once) + q**3 * math.expm1(thrice)) / 2
    assert bound(q, sigma, 3.0) == pytest.approx(three, rel=1e-12)


def test_without_sampling_it_is_the_closed_form():
    for sigma, order in itertools.product((0.01, 1.0, 1e9), (1.01, 3.4, 500.0)):
        assert bound(1.0, sigma, order) == pytest.approx(order / (2 * sigma**2), rel=1e-14)
        assert bound(1 - 1e-12, sigma, math.ceil(order)) == pytest.approx(math.ceil(order) / (2 * sigma**2), rel=1e-6)


def test_at_every_extreme_it_is_finite_above_zero_and_grows_with_order_rate_and_less_noise():
    orders = [1.01, 1.5, 2.0, 2.0001, 3.4, 27.0, 150.5, 500.0, 1023.7]
    rates, noises = [1e-9, 1e-4, 0.5, 1 - 1e-9, 1.0], [0.01, 0.1, 1.0, 50.0, 1e6, 1e9]
    values = np.array([rdp_bound(np.array([q]), np.array([s]), orders)[0] for q in rates for s in noises])
    values = values.reshape(len(rates), len(noises), len(orders))
    assert np.all(np.isfinite(values))
    assert np.all(values > 0.0)
    assert np.all(np.diff(values, axis=0) > -1e-9 * values[1:])
    assert np.all(np.diff(values, axis=1) < 0.0)
    assert np.all(np.diff(values, axis=2) > 0.0)


def test_much_noise_costs_what_it_should_at_the_ledgers_order():
    """Where dp-accounting's own series says 46 times as much."""
    assert rdp_at(step(0.5, 100.0), 3.4) == pytest.approx(divergence(0.5, 100.0, 3.4), rel=1e-3)
    assert charge_units(step(0.5, 100.0), 3.4) <= 1.001 * divergence(0.5, 100.0, 3.4) * UNITS_PER_NAT


@pytest.mark.parametrize(
    ("epsilon", "q", "charges"), [(8.0, 0.5, 1000), (8.0, 0.5, 3000), (8.0, 0.9, 2000), (3.0, 0.3, 20_000)]
)
def test_plans_of_many_rounds_get_the_noise_they_need_and_no_more(epsilon, q, charges):
    sigma = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=q, steps_per_charge=1, charges=charges)
    order = fixed_order(epsilon, DELTA)
    budget = budget_units(epsilon, DELTA, order) / UNITS_PER_NAT
    assert charges * divergence(q, sigma, order) <= budget
    assert charges * divergence(q, 0.99 * sigma, order) > budget
    exact = pld.privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=1e-3
    )
    assert exact.self_compose(charges).get_epsilon_for_delta(DELTA) <= epsilon


def test_curves_for_reading_price_fractional_orders_alike():
    pairs = [(0.5, 100.0), (0.5, 10.0), (0.4, 4.0), (0.01, 1.0)]
    for (q, sigma), curve in zip(pairs, rdp_curves(pairs), strict=True):
        for column in (0, 5, 9, 14, 24, 55, 98):
            priced = rdp_at(step(q, sigma), float(ORDERS[column]))
            assert curve[column] == pytest.approx(priced, rel=1e-6, abs=1e-12)
