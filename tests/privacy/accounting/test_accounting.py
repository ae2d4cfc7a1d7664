"""Accounting against published values, a second library and closed forms."""

from __future__ import annotations

import math

import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import UNITS_PER_NAT, budget_units, conversion, epsilon_of, fixed_order
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian
from conclave.privacy.accounting.prices import charge_units, event_of, rdp_at

DELTA = 1e-5


def charge(q, sigma, steps):
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps)


@settings(deadline=None, max_examples=40)
@given(q=st.floats(1e-3, 0.6), sigma=st.floats(0.7, 20.0), steps=st.integers(1, 500), order=st.integers(2, 40))
def test_rdp_agrees_with_opacus(q, sigma, steps, order):
    ours = rdp_at(charge(q, sigma, steps), float(order))
    assert ours == pytest.approx(
        float(compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=[float(order)])[0]), rel=1e-6
    )


@settings(deadline=None, max_examples=40)
@given(sigma=st.floats(0.3, 50.0), steps=st.integers(1, 1000), order=st.floats(1.1, 60.0))
def test_rdp_of_an_unsampled_gaussian_is_its_closed_form(sigma, steps, order):
    assert rdp_at(charge(1.0, sigma, steps), order) == pytest.approx(steps * order / (2 * sigma**2), rel=1e-9)


def test_charges_round_up_and_budgets_down():
    item, order = charge(0.03, 1.1, 7), 3.4
    assert charge_units(item, order) >= rdp_at(item, order) * UNITS_PER_NAT
    assert budget_units(8.0, DELTA, order) <= (8.0 - conversion(order, DELTA)) * UNITS_PER_NAT
    assert charge_units(charge(1.0, 1e6, 1), 3.4) >= 2  # a tiny charge is never free


@pytest.mark.parametrize("noise", [1e6, 7.57e8, 1e9])
@pytest.mark.parametrize("order", [2.0, 3.4, 27.0])
def test_no_charge_is_free_or_gives_something_back(noise, order):
    """With so much noise the accountant's logarithms cancel to 0 and below; exact is q²α/(2σ²), to first order."""
    for steps in (1, 10_000):
        charge = SampledGaussian(sampling_rate=0.541, noise_multiplier=noise, steps=steps)
        exact = steps * 0.541**2 * order / noise**2 / 2
        assert charge_units(charge, order) >= max(1, exact * UNITS_PER_NAT)
        assert rdp_at(charge, order) >= 0.0


def test_filter_and_dp_accounting_convert_alike():
    order, item = 3.4, charge(0.5, 2.0, 30)
    accountant = rdp.RdpAccountant(orders=[order]).compose(event_of(item))
    assert epsilon_of(charge_units(item, order), order, DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-6)
    assert epsilon_of(0, order, DELTA) == 0.0
    assert epsilon_of(budget_units(8.0, DELTA, order), order, DELTA) <= 8.0


def test_fixed_orders_are_those_documented():
    assert fixed_order(8.0, DELTA) == 3.4
    assert fixed_order(3.0, DELTA) == 6.5


@settings(deadline=None, max_examples=60)
@given(epsilon=st.floats(0.05, 100.0), log_delta=st.floats(-12, -1))
def test_every_budget_that_is_accepted_allows_something(epsilon, log_delta):
    delta = 10.0**log_delta
    try:
        order = fixed_order(epsilon, delta)
    except BadInputError:
        assert conversion(1024.0, delta) >= epsilon
        return
    assert order > 1.0
    assert budget_units(epsilon, delta, order) > 0


def test_impossible_requests_are_refused_in_one_sentence():
    with pytest.raises(BadInputError, match="must be larger"):
        fixed_order(1e-4, 1e-12)
    with pytest.raises(BadInputError, match="more than any budget"):
        rdp_at(charge(0.5, 1e-200, 1), 3.4)


def test_infinite_values_never_arise_from_ordinary_charges():
    for q in (1e-6, 1e-3, 0.1, 0.5, 0.999, 1.0):
        for sigma in (0.3, 1.0, 5.0, 1e3):
            assert math.isfinite(rdp_at(charge(q, sigma, 1), 3.4))


def test_choices_by_the_exponential_mechanism_are_charged_by_their_closed_form():
    assert rdp_at(ExponentialChoice(epsilon=0.4, choices=3), 3.4) == pytest.approx(3 * 3.4 * 0.4**2 / 8)
    assert rdp_at(ExponentialChoice(epsilon=5.0, choices=2), 3.4) == 10.0  # 3.4·25/8 exceeds ε
    one, five = (charge_units(ExponentialChoice(epsilon=0.7, choices=k), 6.5) for k in (1, 5))
    assert five >= 6.5 * 0.7**2 / 8 * 5 * UNITS_PER_NAT
    assert 0 <= 5 * one - five <= 5


def test_what_the_filter_charges_is_not_below_the_best_rdp():
    for q, sigma, steps in ((0.02, 0.8, 300), (0.2, 3.0, 50), (0.5, 2.0, 30), (1.0, 5.0, 5)):
        order = fixed_order(8.0, DELTA)
        best = rdp.RdpAccountant().compose(event_of(charge(q, sigma, steps))).get_epsilon(DELTA)
        assert epsilon_of(charge_units(charge(q, sigma, steps), order), order, DELTA) >= best - 1e-9
