"""Accounting against published values, a second library and closed forms."""

from __future__ import annotations

import math

import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from model.errors import BadInputError
from privacy.accounting import (
    UNITS_PER_NAT,
    SampledGaussian,
    budget_units,
    calibrate_noise,
    charge_units,
    conversion,
    epsilon_by_accountant,
    epsilon_of,
    fixed_order,
    rdp_at,
)

DELTA = 1e-5


def charge(q, sigma, steps):
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps)


PINS = [
    ([charge(0.01, 1.0, 1000)], 2.101, 1.828),
    ([charge(0.05, 1.2, 200)], 3.778, 3.382),
    ([charge(1.0, 10.0, 20)], 1.914, 1.760),
    ([charge(0.01, 1.0, 1000), charge(0.05, 1.2, 200), charge(1.0, 10.0, 20)], 4.776, 4.343),
]


@pytest.mark.parametrize(("charges", "by_rdp", "by_pld"), PINS)
def test_pinned_epsilons(charges, by_rdp, by_pld):
    got = epsilon_by_accountant(charges, DELTA)
    assert got["rdp"] == pytest.approx(by_rdp, abs=6e-4)
    assert got["pld"] == pytest.approx(by_pld, abs=6e-4)
    assert got["prv"] == pytest.approx(by_pld, rel=0.03)


def test_one_charge_of_many_steps_is_many_charges_of_one():
    whole = epsilon_by_accountant([charge(0.05, 1.2, 200)], DELTA)
    assert epsilon_by_accountant([charge(0.05, 1.2, 1)] * 200, DELTA) == whole
    assert epsilon_by_accountant([], DELTA) == {"rdp": 0.0, "pld": 0.0, "prv": 0.0}


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


def test_filter_and_dp_accounting_convert_alike():
    order, item = 3.4, charge(0.5, 2.0, 30)
    accountant = rdp.RdpAccountant(orders=[order]).compose(item.event)
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


@pytest.mark.parametrize(
    ("epsilon", "q", "steps", "charges"), [(8.0, 0.5, 1, 30), (3.0, 0.1, 4, 30), (1.0, 0.01, 10, 100)]
)
def test_calibrated_noise_just_passes_the_filter_that_enforces(epsilon, q, steps, charges):
    sigma = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=q, steps_per_charge=steps, charges=charges)
    order = fixed_order(epsilon, DELTA)
    budget = budget_units(epsilon, DELTA, order)
    assert charges * charge_units(charge(q, sigma, steps), order) <= budget
    assert charges * charge_units(charge(q, sigma * (1 - 1e-5), steps), order) > budget


def test_pld_calibration_would_be_refused():
    """The trap: σ from a PLD curve spends more than the budget when it is enforced with RDP."""
    low, high = 0.5, 5.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (
            (low, middle) if epsilon_by_accountant([charge(0.05, middle, 200)], DELTA)["pld"] <= 8 else (middle, high)
        )
    order = fixed_order(8.0, DELTA)
    spent = charge_units(charge(0.05, high, 200), order)
    assert spent > budget_units(8.0, DELTA, order)
    assert epsilon_of(spent, order, DELTA) > 8.5


def test_charging_two_releases_of_one_sample_apart_understates():
    apart = epsilon_by_accountant([charge(0.01, 1.0, 1000), charge(0.01, 1.0, 1000)], DELTA)["pld"]
    together = epsilon_by_accountant([charge(0.01, 2**-0.5, 1000)], DELTA)["pld"]
    assert apart == pytest.approx(2.58, abs=0.05)
    assert together == pytest.approx(4.48, abs=0.05)


def test_impossible_requests_are_refused_in_one_sentence():
    with pytest.raises(BadInputError, match="must be larger"):
        fixed_order(1e-4, 1e-12)
    with pytest.raises(BadInputError, match="fewer rounds or a larger epsilon"):
        calibrate_noise(epsilon=0.05, delta=1e-9, sampling_rate=1.0, steps_per_charge=10**6, charges=10**6)
    with pytest.raises(BadInputError, match="more than any budget"):
        rdp_at(charge(0.5, 1e-200, 1), 3.4)


def test_rdp_is_not_below_pld_on_random_plans():
    for q, sigma, steps in ((0.02, 0.8, 300), (0.2, 3.0, 50), (0.5, 2.0, 30), (1.0, 5.0, 5)):
        got = epsilon_by_accountant([charge(q, sigma, steps)], DELTA)
        assert got["rdp"] >= got["pld"] - 1e-3
        assert got["prv"] == pytest.approx(got["pld"], rel=0.03)
        order = fixed_order(8.0, DELTA)
        assert epsilon_of(charge_units(charge(q, sigma, steps), order), order, DELTA) >= got["rdp"] - 1e-9


def test_infinite_values_never_arise_from_ordinary_charges():
    for q in (1e-6, 1e-3, 0.1, 0.5, 0.999, 1.0):
        for sigma in (0.3, 1.0, 5.0, 1e3):
            assert math.isfinite(rdp_at(charge(q, sigma, 1), 3.4))
