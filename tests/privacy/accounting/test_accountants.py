"""Three accountants against published values, the libraries asked directly, and each other."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from conftest import in_the_soak_unless
from dp_accounting import ComposedDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from conclave.base.errors import BadInputError
from conclave.privacy.accounting import accountants, pld_epsilon, prv_epsilon
from conclave.privacy.accounting.accountants import accountant_report, epsilon_by_accountant
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian
from conclave.privacy.accounting.prices import event_of

DELTA = 1e-5


@pytest.fixture(autouse=True)
def _no_results_of_other_tests():
    accountants._report.cache_clear()


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


def test_charging_two_releases_of_one_sample_apart_understates():
    apart = epsilon_by_accountant([charge(0.01, 1.0, 1000), charge(0.01, 1.0, 1000)], DELTA)["pld"]
    together = epsilon_by_accountant([charge(0.01, 2**-0.5, 1000)], DELTA)["pld"]
    assert apart == pytest.approx(2.58, abs=0.05)
    assert together == pytest.approx(4.48, abs=0.05)


def random_plan(seed):
    """One to four kinds of charges, of costs that a plan could have."""
    generator = np.random.default_rng(seed)
    plan = []
    for _ in range(1 + seed % 4):
        q = 1.0 if generator.random() < 0.15 else float(10 ** generator.uniform(-3, -0.2))
        sigma = float(10 ** generator.uniform(-0.2, 1))
        bearable = 1 + 4.0 / math.log1p(q * q * math.expm1(sigma**-2))  # steps of about 4 nats
        plan.append(charge(q, sigma, max(1, min(5000, int(generator.uniform(0.02, 0.4) * bearable)))))
    return plan, float(10 ** generator.uniform(-7, -4))


@pytest.mark.parametrize("seed", in_the_soak_unless(range(4), range(14)))
def test_accountants_agree_on_random_plans(seed):
    plan, delta = random_plan(seed)
    got = epsilon_by_accountant(plan, delta)
    assert got["prv"] == pytest.approx(got["pld"], rel=0.03, abs=0.012)  # PRV adds its error of 0.01
    assert got["rdp"] >= got["pld"] - 1e-3


@pytest.mark.parametrize("seed", in_the_soak_unless([1, 2], [1, 2, 3, 7]))
def test_values_are_those_of_the_libraries_themselves(seed):
    plan, delta = random_plan(seed)
    got = epsilon_by_accountant(plan, delta)
    event = ComposedDpEvent([event_of(one) for one in plan])
    assert got["pld"] == pytest.approx(PLDAccountant().compose(event).get_epsilon(delta), rel=1e-6)
    opacus = PRVAccountant()
    opacus.history = [(one.noise_multiplier, one.sampling_rate, one.steps) for one in plan]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert got["prv"] == pytest.approx(opacus.get_epsilon(delta=delta), abs=2e-3)


def test_counts_are_many_charges():
    one, other = charge(0.05, 1.2, 4), charge(0.02, 1.0, 1)
    listed = epsilon_by_accountant([one] * 20 + [other] * 3, DELTA)
    assert epsilon_by_accountant({one: 20, other: 3}, DELTA) == listed
    assert epsilon_by_accountant({one: 20, other: 3, charge(0.5, 1.0, 9): 0}, DELTA) == listed
    assert epsilon_by_accountant((c for c in [other] * 3 + [one] * 20), DELTA) == listed


def test_half_a_million_charges_are_one_curve(monkeypatch):
    built = []
    gaussian = pld_epsilon.pld.from_gaussian_mechanism
    monkeypatch.setattr(
        pld_epsilon.pld, "from_gaussian_mechanism", lambda **values: built.append(values) or gaussian(**values)
    )
    one = charge(0.000917, 4.0, 1)
    got = epsilon_by_accountant({one: 500_000}, DELTA)
    assert got["prv"] == pytest.approx(got["pld"], rel=0.03)
    assert got["pld"] <= got["rdp"]
    grown = epsilon_by_accountant({one: 500_001}, DELTA)
    assert len(built) == 1
    assert grown["pld"] >= got["pld"]


def test_a_growing_ledger_builds_no_curve_twice(monkeypatch):
    built = []
    spectrum = prv_epsilon._spectrum
    monkeypatch.setattr(prv_epsilon, "_spectrum", lambda *given: built.append(given[0]) or spectrum(*given))
    for rounds in range(50, 54):
        epsilon_by_accountant({charge(0.0417, 1.31, 2): rounds, charge(0.0211, 1.7, 1): rounds}, DELTA)
    assert len(built) <= 4  # once each; the grid may widen as the ledger grows, but not every time


def test_many_distinct_pairs_are_rounded_upwards_and_said_so(monkeypatch):
    """Against the exact values of the same plans: never below, and closer with more cells."""
    monkeypatch.setattr(pld_epsilon, "_FINEST_INTERVAL", 8e-4)
    generator = np.random.default_rng(0)
    plan = [
        charge(float(q), float(s), 3)
        for q, s in zip(generator.uniform(0.02, 0.1, 24), generator.uniform(0.9, 3.0, 24), strict=True)
    ]
    exact = accountant_report(plan, DELTA)
    assert exact.grid is None
    gaps = []
    for cells in (3, 12):
        monkeypatch.setattr(accountants, "MOST_PAIRS", cells)
        accountants._report.cache_clear()
        rounded = accountant_report(plan, DELTA)
        assert rounded.epsilon["rdp"] == exact.epsilon["rdp"]  # RDP rounds nothing
        for name in ("pld", "prv"):
            assert rounded.epsilon[name] >= exact.epsilon[name]
        gaps.append(rounded.epsilon["pld"] - exact.epsilon["pld"])
        assert rounded.grid.startswith(f"24 distinct (q, σ) rounded to {cells}: σ down by at most ")
        assert f"RDP rises from {exact.epsilon['rdp']:.4f} to " in rounded.grid
    assert gaps[1] < gaps[0]


def test_coarse_curves_are_upper_bounds(monkeypatch):
    plan, delta = random_plan(3)
    exact = epsilon_by_accountant(plan, delta)
    accountants._report.cache_clear()
    monkeypatch.setattr(pld_epsilon, "_MOST_POINTS", 2**13)
    monkeypatch.setattr(prv_epsilon, "_MOST_POINTS_EACH", 2**12)
    coarse = epsilon_by_accountant(plan, delta)
    accountants._report.cache_clear()
    assert exact["pld"] < coarse["pld"] < 1.1 * exact["pld"]
    assert exact["prv"] - 2e-3 < coarse["prv"]


def test_a_coarse_grid_keeps_the_mean_of_narrow_losses(monkeypatch):
    """Losses of 1e-3 on a grid that coarse: 10,000 roundings would add up were the mean not put back."""
    monkeypatch.setattr(prv_epsilon, "_MOST_POINTS_EACH", 2**16)
    got = epsilon_by_accountant([charge(0.001, 0.6, 10_000)], DELTA)
    assert got["pld"] <= got["prv"] <= got["pld"] + 0.13  # the error it states there is 0.112


def test_gaussians_without_sampling_are_one_gaussian():
    plan = [charge(1.0, 20.0 + i, 2) for i in range(300)]
    joint = sum(one.steps / one.noise_multiplier**2 for one in plan) ** -0.5
    report = accountant_report(plan, DELTA)
    assert report.grid is None
    whole = epsilon_by_accountant([charge(1.0, joint, 1)], DELTA)
    for name, value in report.epsilon.items():
        assert value == pytest.approx(whole[name], rel=1e-6)


def test_choices_leave_rdp_alone():
    gaussian, choice = charge(0.05, 1.2, 200), ExponentialChoice(epsilon=0.1, choices=4)
    assert epsilon_by_accountant([gaussian, choice], DELTA).keys() == {"rdp"}
    # By hand: the best order over dp-accounting's for a plain Gaussian and choices.
    got = epsilon_by_accountant({charge(1.0, 2.0, 1): 3, choice: 5}, DELTA)["rdp"]
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
    by_hand = min(
        3 * a / 8 + 20 * min(0.1, a * 0.1**2 / 8) + math.log1p(-1 / a) - math.log(DELTA * a) / (a - 1) for a in orders
    )
    assert got == pytest.approx(by_hand, rel=1e-9)
    assert epsilon_by_accountant([choice] * 2, DELTA) == epsilon_by_accountant({choice: 2}, DELTA)
    assert epsilon_by_accountant([choice] * 2, DELTA)["rdp"] <= 0.8 + 1e-9  # pure ε of eight choices


def test_what_the_methods_cannot_hold_is_left_out(monkeypatch):
    monkeypatch.setattr(pld_epsilon, "_MOST_POINTS", 2**17)
    ruinous = epsilon_by_accountant({charge(0.5, 1.0, 10): 500_000}, DELTA)
    assert ruinous.keys() == {"rdp"}
    assert ruinous["rdp"] > 1e6
    assert epsilon_by_accountant([charge(0.01, 0.03, 1)], DELTA).keys() == {"rdp", "pld"}
    nothing = epsilon_by_accountant([charge(1e-6, 10.0, 1)], DELTA)
    assert nothing["pld"] == 0.0
    assert 0.0 <= nothing["prv"] <= 0.0101


def test_bad_input_is_refused_in_one_sentence():
    with pytest.raises(BadInputError, match=r"^a noise multiplier of 0\.001 costs more than any budget$"):
        epsilon_by_accountant([charge(0.5, 0.001, 1)], DELTA)
    with pytest.raises(BadInputError, match=r"^a mechanism is charged -1 times, must be at least 0$"):
        epsilon_by_accountant({charge(0.5, 1.0, 1): -1}, DELTA)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(BadInputError, match=r"^delta is .*, must be above 0 and below 1$"):
            epsilon_by_accountant([], delta)
