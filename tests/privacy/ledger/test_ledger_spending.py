"""Where a budget stands, against sums worked out by hand and against the ledger itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from ledger_samples import KEY, MACHINE, new_ledger, open_ledger, request, spend
from ledger_tampering import Forger

from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import BudgetExhaustedError
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.spending import budget_of, forecast
from conclave.privacy.ledger.upkeep.recovery import recover
from conclave.privacy.ledger.witness import Witness

ORDER, DELTA = 3.4, 1e-5
CONVERSION = math.log(1 - 1 / ORDER) - (math.log(DELTA) + math.log(ORDER)) / (ORDER - 1)
UNITS = math.floor((8.0 - CONVERSION) * 1e12)
"""An unsampled Gaussian costs α/(2σ²): at σ = 20, 3.4/800 = 0.00425 nats, and the margin of 1e-9 rounded up."""
PLAIN = SampledGaussian(sampling_rate=1.0, noise_multiplier=20.0, steps=1)
PRICE = math.ceil(0.00425 * (1 + 1e-9) * 1e12)


def plain(round_number=1, **changes):
    return request(round_number, mechanism=PLAIN, **changes)


def epsilon(units: int) -> float:
    return units / 1e12 + CONVERSION if units else 0.0


def charge(ledger, item, *, commit=True):
    reservation = ledger.reserve(item, bytes(32))
    if commit:
        ledger.commit(reservation, b"reply")


def of(folder):
    return budget_of(LedgerFile(folder / "ledger.db"))


def agrees(budget, ledger):
    assert budget.spent == ledger.epsilon_spent
    assert sum(run.set_aside for run in budget.runs) == ledger.units_set_aside
    assert sum(budget.shares.values()) == pytest.approx(1.0)


def test_an_untouched_budget(tmp_path):
    ledger = new_ledger(tmp_path)
    budget = of(tmp_path)
    assert (budget.spent, budget.committed_to, budget.left) == (0.0, 0.0, 8.0)
    assert (budget.shares, budget.free_units) == ({"spent": 0.0, "set_aside": 0.0, "left": 1.0}, UNITS)
    assert (budget.runs, budget.curve) == ([], [])
    assert (budget.epsilon, budget.delta, budget.order) == (8.0, DELTA, ORDER)
    assert (budget.ledger_id, budget.unit, budget.mode) == (ledger.genesis.ledger_id, "record", "simulation")
    agrees(budget, ledger)


def test_charges_of_two_runs_add_up(tmp_path):
    ledger = new_ledger(tmp_path)
    charge(ledger, plain(1))
    charge(ledger, plain(2))
    charge(ledger, plain(1, run_id="8"), commit=False)
    charge(ledger, plain(2, run_id="8"))
    budget = of(tmp_path)
    assert charge_units(PLAIN, ORDER) == pytest.approx(PRICE, abs=2)
    price = charge_units(PLAIN, ORDER)
    assert budget.spent == pytest.approx(epsilon(4 * PRICE), abs=1e-10)
    assert budget.left == pytest.approx(8.0 - epsilon(4 * PRICE), abs=1e-10)
    assert budget.free_units == UNITS - 4 * price
    assert budget.shares["spent"] == pytest.approx(4 * PRICE / UNITS, rel=1e-9)
    assert [(r.run_id, r.charges, r.committed, r.abandoned, r.units) for r in budget.runs] == [
        ("7", 2, 2, 0, 2 * price),
        ("8", 2, 1, 0, 2 * price),
    ]
    assert [value for _, value in budget.curve] == pytest.approx([epsilon(n * PRICE) for n in (1, 2, 3, 4)], abs=1e-10)
    agrees(budget, ledger)


def test_an_abandoned_charge_is_spent(tmp_path):
    ledger = new_ledger(tmp_path)
    charge(ledger, plain(), commit=False)
    ledger._append_for(plain(), plain().charge_id(ledger.genesis.ledger_id), "ABANDONED")
    budget = of(tmp_path)
    assert (budget.runs[0].abandoned, budget.runs[0].units) == (1, charge_units(PLAIN, ORDER))
    agrees(budget, ledger)


def test_what_is_set_aside_is_drawn_first_and_given_back_at_the_end(tmp_path):
    ledger = new_ledger(tmp_path)
    price = charge_units(PLAIN, ORDER)
    ledger.admit(plain(), 3)
    ledger.admit(plain(plan_hash="b" * 64), 2)
    for drawn, aside in ((0, 5), (1, 4), (2, 3), (3, 2)):
        if drawn:
            charge(ledger, plain(drawn))
        budget = of(tmp_path)
        assert budget.runs[0].set_aside == aside * price
        assert budget.free_units == UNITS - (drawn + aside) * price
        assert budget.committed_to == pytest.approx(epsilon((drawn + aside) * PRICE), abs=1e-10)
        agrees(budget, ledger)
    ledger.close_plans("7")
    budget = of(tmp_path)
    assert (budget.runs[0].set_aside, budget.free_units) == (0, UNITS - 3 * price)
    assert budget.spent == budget.committed_to
    agrees(budget, ledger)


def test_without_privacy_everything_is_spent(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1, sigma=None)
    budget = of(tmp_path)
    assert (budget.spent, budget.committed_to) == (math.inf, math.inf)
    assert (budget.left, budget.free_units) == (0.0, 0)
    assert budget.spent == ledger.epsilon_spent
    assert forecast(budget, ledger.genesis, {PLAIN: 1}).epsilon_after == math.inf
    assert not forecast(budget, ledger.genesis, {PLAIN: 1}).fits


def test_after_an_unproven_restore_nothing_is_left_and_after_a_proven_one_all_that_was(tmp_path):
    witness = Witness(tmp_path / "witness")
    ledger = new_ledger(tmp_path, witness=witness)
    ledger.admit(plain(), 5)
    charge(ledger, plain())
    spent = ledger.epsilon_spent
    ledger.close()
    recover(tmp_path / "ledger.db", KEY, witness=witness, machine=MACHINE)
    budget = of(tmp_path)
    assert (budget.spent, budget.runs[0].set_aside) == (spent, 0)
    agrees(budget, open_ledger(tmp_path))
    witness.path.unlink()
    recover(tmp_path / "ledger.db", KEY, witness=witness, machine=MACHINE)
    budget = of(tmp_path)
    assert budget.spent == pytest.approx(8.0)
    assert (budget.free_units, budget.shares["left"]) == (0, 0.0)
    assert budget.left == pytest.approx(0.0, abs=1e-9)
    agrees(budget, open_ledger(tmp_path))


def test_a_forecast_fits_exactly_where_the_ledger_admits(tmp_path):
    ledger = new_ledger(tmp_path)
    price = charge_units(PLAIN, ORDER)
    ledger.admit(plain(plan_hash="b" * 64), 100)
    charge(ledger, plain(1, run_id="8"))
    budget = of(tmp_path)
    most = (UNITS - 101 * price) // price
    fits, too_many = (forecast(budget, ledger.genesis, {PLAIN: n}) for n in (most, most + 1))
    assert (fits.fits, too_many.fits) == (True, False)
    assert fits.charges == most
    assert fits.share == pytest.approx(most * PRICE / UNITS, rel=1e-9)
    assert fits.epsilon_after == pytest.approx(epsilon((101 + most) * PRICE), abs=1e-6)
    assert fits.epsilon_after <= 8.0 < too_many.epsilon_after
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(plain(run_id="9"), most + 1)
    ledger.admit(plain(run_id="9"), most)


def test_entries_about_the_ledger_cost_nothing():
    forger = Forger().charge(plain()).add("MIGRATED", "0" * 64, "{}").add("ROTATED", "1" * 64, "{}")
    assert budget_of(forger.history()).free_units == UNITS - charge_units(PLAIN, ORDER)


@pytest.mark.parametrize("charges", [1, 40])
def test_a_forecast_counts_choices_as_the_ledger_does(tmp_path, charges):
    """A plan whose nodes choose experts: what is forecast to fit is admitted, and one charge more is neither."""
    choice = ExponentialChoice(epsilon=0.05, choices=4)
    ledger = new_ledger(tmp_path)
    budget = of(tmp_path)
    price = charge_units(PLAIN, ORDER)
    most = (UNITS - charges * charge_units(choice, ORDER)) // price
    chosen = replace(plain(), kind="choose", mechanism=choice, releases=("choice",))
    assert not forecast(budget, ledger.genesis, {PLAIN: most + 1, choice: charges}).fits
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(plain(), most + 1, [(chosen, charges)])
    expected = forecast(budget, ledger.genesis, {PLAIN: most, choice: charges})
    assert (expected.fits, expected.charges) == (True, most + charges)
    ledger.admit(plain(), most, [(chosen, charges)])
    assert of(tmp_path).committed_to == pytest.approx(expected.epsilon_after, abs=1e-9)
