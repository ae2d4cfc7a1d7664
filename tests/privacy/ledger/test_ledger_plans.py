"""Plans: budget set aside before the first round, local state, and what becomes of redelivered requests."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from ledger_samples import new_ledger, open_ledger, request, spend

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import (
    AlreadyChargedError,
    BudgetExhaustedError,
    ChargeAbandonedError,
    ChargeConflictError,
    PlanClosedError,
    ReplyExpiredError,
    Reservation,
    StoredReply,
)
from conclave.privacy.ledger.ledger import KEPT_REPLIES
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.witness import Witness


def item(round_number=1, **changes):
    return request(round_number, sigma=2.0, **changes)


OTHER = {"run_id": "8", "plan_hash": "q" * 64}


@pytest.fixture
def ledger(tmp_path):
    return new_ledger(tmp_path)


@pytest.fixture
def price(ledger):
    return charge_units(item().mechanism, float(ledger.genesis.order))


@pytest.fixture
def fits(ledger, price):
    return int(ledger.genesis.rdp_budget) // price


def holds(ledger):
    audit = audit_history(LedgerFile(ledger.path))
    assert audit.findings == []
    return audit


def charge(ledger, request, **options):
    reservation = ledger.reserve(request, bytes(32))
    assert isinstance(reservation, Reservation)
    return ledger.commit(reservation, b"reply", **options)


def test_what_is_set_aside_cannot_be_taken_by_another_run(ledger, price, fits):
    ledger.admit(item(), fits - 1)
    assert ledger.units_set_aside == (fits - 1) * price
    charge(ledger, item(**OTHER))
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(item(2, **OTHER), bytes(32))
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(item(2, **OTHER), 1)
    for round_number in range(1, fits):
        charge(ledger, item(round_number))
    assert ledger.units_set_aside == 0
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(item(1, run_id="9"), bytes(32))
    assert holds(ledger).charges == fits


def test_a_plan_is_admitted_once_and_again_for_free(ledger, price):
    ledger.admit(item(), 3)
    charge(ledger, item())
    written = ledger.entries()
    for charges in (3, 10**9):
        ledger.admit(item(), charges)
    assert ledger.entries() == written
    assert ledger.units_set_aside == 2 * price
    assert ledger.is_open("7", "p" * 64)
    assert not ledger.is_open("8", "p" * 64)


def test_a_plan_over_the_budget_is_refused_and_writes_nothing(ledger, fits):
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(item(), fits + 1)
    assert (ledger.entries(), ledger.units_set_aside) == ([], 0)
    assert not ledger.is_open("7", "p" * 64)
    ledger.admit(item(), fits)
    holds(ledger)


def test_a_closed_plan_gives_back_the_rest_and_stays_closed(ledger, price, fits):
    ledger.admit(item(), fits)
    charge(ledger, item())
    assert ledger.close_plans("8") == 0
    assert ledger.close_plans("7") == 1
    assert ledger.close_plans("7") == 0
    assert ledger.units_set_aside == 0
    with pytest.raises(PlanClosedError):
        ledger.admit(item(), 1)
    ledger.admit(item(**OTHER), fits - 1)  # the whole rest
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(item(run_id="9"), 1)
    assert [entry.state for entry in ledger.entries()] == ["ADMITTED", "RESERVED", "COMMITTED", "CLOSED", "ADMITTED"]
    holds(ledger)


def test_a_plan_draws_no_more_than_it_was_admitted_with(ledger, price, fits):
    """However much of the budget is free, and whatever round the charge is said to be of."""
    ledger.admit(item(), 2)
    for round_number in (1, 2):
        charge(ledger, item(round_number))
    before = ledger.entries()
    for round_number in (3, 1, 0, 10**6):
        with pytest.raises(AlreadyChargedError):
            ledger.reserve(item(round_number, model_in_hash="n" * 64), bytes(32))
    assert (ledger.entries(), ledger.units_set_aside) == (before, 0)
    assert charge(ledger, item(3, **OTHER))  # of no plan: the budget alone bounds it
    holds(ledger)


@pytest.mark.parametrize(
    "changes",
    [{"sigma": 0.5}, {"sigma": 3.0}, {"clip": 2.0}, {"numeric": "strict"}],
)
def test_a_plan_draws_nothing_else_than_it_was_admitted_with(ledger, fits, changes):
    ledger.admit(item(), fits)
    before = (ledger.units_set_aside, ledger.entries())
    with pytest.raises(AlreadyChargedError):
        ledger.reserve(request(1, **({"sigma": 2.0} | changes)), bytes(32))
    assert (ledger.units_set_aside, ledger.entries()) == before
    holds(ledger)


@pytest.mark.parametrize("admitted", [True, False])
@pytest.mark.parametrize("state", ["RESERVED", "COMMITTED"])
def test_a_round_is_charged_once_whatever_comes_with_it(tmp_path, admitted, state):
    """Another model, another plan, another open file: the run's round is the same."""
    ledger = new_ledger(tmp_path)
    if admitted:
        ledger.admit(item(), 10)
    reservation = ledger.reserve(item(), bytes(32))
    if state == "COMMITTED":
        ledger.commit(reservation, b"reply")
    before = ledger.entries()
    for changes in ({"model_in_hash": "n" * 64}, {"plan_hash": "q" * 64}, {"releases": ("loss",), "plan_hash": "q"}):
        for other in (ledger, open_ledger(tmp_path)):
            with pytest.raises(AlreadyChargedError):
                other.reserve(item(**changes), bytes(32))
    assert ledger.entries() == before
    again = ledger.reserve(item(), bytes(32))  # and a redelivery is what it always was
    assert isinstance(again, StoredReply if state == "COMMITTED" else Reservation)
    for changes in ({"kind": "choose"}, {"run_id": "8"}, {"round_number": 2}):
        assert isinstance(ledger.reserve(item(**changes, plan_hash="r" * 64), bytes(32)), Reservation)


def test_what_was_abandoned_may_be_charged_anew_within_the_plan(ledger):
    """It released nothing, and stays spent: the plan's number bounds what is drawn, anew or not."""
    ledger.admit(item(), 3)
    ledger.reserve(item(), bytes(32), repeat_key="before")
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(item(), bytes(32), repeat_key="after")
    with pytest.raises(ChargeAbandonedError):  # the same again is not run again
        ledger.reserve(item(), bytes(32), repeat_key="after")
    charge(ledger, item(model_in_hash="n" * 64))
    with pytest.raises(AlreadyChargedError):  # the round has its release now
        ledger.reserve(item(model_in_hash="o" * 64), bytes(32))
    charge(ledger, item(2))
    assert ledger.units_set_aside == 0
    with pytest.raises(AlreadyChargedError):
        ledger.reserve(item(3), bytes(32))
    audit = holds(ledger)
    assert (audit.charges, audit.committed, audit.abandoned) == (3, 2, 1)


def test_a_closed_plan_draws_nothing(ledger):
    ledger.admit(item(), 3)
    ledger.close_plans("7")
    before = ledger.entries()
    with pytest.raises(PlanClosedError):
        ledger.reserve(item(), bytes(32))
    assert ledger.entries() == before


def test_what_was_drawn_is_counted_over_many_runs_and_after_a_rollback(ledger, tmp_path):
    """A refusal after the count was taken must not be counted; nor may runs in between make one forgotten."""
    ledger.admit(item(), 2)
    for number in range(20):
        charge(ledger, request(1, sigma=100.0, run_id=f"other-{number}"))
        with pytest.raises(AlreadyChargedError):
            ledger.reserve(request(1, sigma=100.0, run_id=f"other-{number // 2}", model_in_hash="n" * 64), bytes(32))
    with pytest.raises(sqlite3.Error):
        ledger.reserve(item(), object())  # SQLite holds no such secret: the entry is rolled back
    charge(ledger, item())
    charge(ledger, item(2))
    with pytest.raises(AlreadyChargedError):
        ledger.reserve(item(3), bytes(32))
    holds(ledger)


def test_of_threads_that_race_for_one_round_one_is_charged(tmp_path):
    """Eight connections to one file, eight models, one round."""
    ledger = new_ledger(tmp_path)
    ledger.admit(item(), 5)
    others = [open_ledger(tmp_path) for _ in range(8)]
    ready = threading.Barrier(len(others))

    def race(number):
        ready.wait()
        try:
            return others[number].reserve(item(model_in_hash=f"{number:064x}"), bytes(32))
        except AlreadyChargedError:
            return None

    with ThreadPoolExecutor(len(others)) as pool:
        won = [found for found in pool.map(race, range(len(others))) if found is not None]
    assert len(won) == 1
    assert [entry.charge_id for entry in ledger.entries() if entry.state == "RESERVED"] == [won[0].charge_id]
    holds(ledger)


def test_two_plans_of_one_run_are_closed_together(ledger):
    ledger.admit(item(), 1)
    ledger.admit(item(plan_hash="q" * 64), 1)
    assert ledger.close_plans("7") == 2
    holds(ledger)


def test_plans_survive_opening_again(ledger, tmp_path, price):
    ledger.admit(item(), 3)
    charge(ledger, item())
    ledger.close()
    again = open_ledger(tmp_path)
    assert again.units_set_aside == 2 * price
    assert again.is_open("7", "p" * 64)


def test_a_plan_without_privacy_sets_nothing_aside_and_may_come_again(ledger):
    none = request(sigma=None)
    ledger.admit(none, 5)
    assert ledger.units_set_aside == 0
    charge(ledger, none)
    ledger.admit(request(sigma=None, **OTHER), 5)  # its price is infinite already
    charge(ledger, request(sigma=None, **OTHER))
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(item(run_id="9"), 1)
    assert holds(ledger).epsilon == float("inf")


def test_a_plan_that_only_simulations_may_have_is_refused(tmp_path):
    ledger = new_ledger(tmp_path, mode="deployment", witness=Witness(tmp_path / "witness"))
    for bad in (request(sigma=None), request(rng="seeded")):
        with pytest.raises(BadInputError, match="simulation only"):
            ledger.admit(bad, 1)
    assert ledger.entries() == []


# Local state.


def test_local_state_switches_with_the_commit_and_ends_with_the_run(ledger):
    ledger.admit(item(), 5)
    reservation = ledger.reserve(item(), bytes(32))
    assert ledger.local_state("run/7/clip") is None
    ledger.commit(reservation, b"reply", {"run/7/clip": b"1.5", "run/70/clip": b"other"})
    assert ledger.local_state("run/7/clip") == b"1.5"
    charge(ledger, item(2), local_state={"run/7/clip": b"1.25"})
    assert ledger.local_state("run/7/clip") == b"1.25"
    charge(ledger, item(3))
    assert ledger.local_state("run/7/clip") == b"1.25"  # left as it was
    ledger.close_plans("7")
    assert ledger.local_state("run/7/clip") is None
    assert ledger.local_state("run/70/clip") == b"other"  # another run's


def test_a_losers_local_state_is_discarded_with_its_reply(ledger):
    winner = ledger.reserve(item(), bytes(32))
    loser = ledger.reserve(item(), bytes(32))
    ledger.commit(winner, b"winner", {"run/7/clip": b"1"})
    assert ledger.commit(loser, b"loser", {"run/7/clip": b"2", "run/7/more": b"3"}).body == b"winner"
    assert ledger.local_state("run/7/clip") == b"1"
    assert ledger.local_state("run/7/more") is None


def test_a_commit_that_fails_leaves_no_part_of_it(ledger):
    reservation = ledger.reserve(item(), bytes(32))
    before = ledger.head
    with pytest.raises(Exception, match="type"):  # SQLite cannot hold such a value
        ledger.commit(reservation, b"reply", {"run/7/clip": object()})
    assert ledger.head == before
    assert ledger.local_state("run/7/clip") is None
    again = ledger.reserve(item(), bytes(32))
    assert isinstance(again, Reservation)
    assert ledger.commit(again, b"reply", {"run/7/clip": b"1"}).body == b"reply"


# Redelivery.


def test_the_latest_replies_are_kept_and_older_ones_expire(ledger):
    spend(ledger, KEPT_REPLIES + 3, sigma=20.0)
    last = KEPT_REPLIES + 3
    for round_number in range(1, last + 1):
        old = request(round_number, sigma=20.0)
        if round_number <= last - KEPT_REPLIES:
            with pytest.raises(ReplyExpiredError):
                ledger.reserve(old, bytes(32))
        else:
            stored = ledger.reserve(old, bytes(32))
            assert isinstance(stored, StoredReply)
            assert (stored.body, stored.receipt.seq) == (b"reply", 2 * round_number)
            assert ledger.holds(stored.receipt)
    assert len(ledger.entries()) == 2 * last


@pytest.mark.parametrize(
    "changes",
    [{"sigma": 3.0}, {"clip": 2.0}, {"releases": ("loss",)}, {"numeric": "strict"}, {"rng": "seeded"}],
)
@pytest.mark.parametrize("committed", [False, True])
def test_the_same_charge_with_other_content_is_an_error(ledger, changes, committed):
    if committed:
        charge(ledger, request())
    else:
        ledger.reserve(request(), bytes(32))
    before = ledger.entries()
    with pytest.raises(ChargeConflictError):
        ledger.reserve(request(**changes), bytes(32))
    assert ledger.entries() == before


def test_work_that_cannot_be_repeated_exactly_is_abandoned(ledger):
    ledger.reserve(item(), b"1" * 32, repeat_key="before")
    spent = ledger.epsilon_spent
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(item(), b"2" * 32, repeat_key="after")
    with pytest.raises(ChargeAbandonedError):  # also for whoever comes with the first key
        ledger.reserve(item(), b"2" * 32, repeat_key="before")
    assert ledger.epsilon_spent == spent
    assert holds(ledger).abandoned == 1
    same = ledger.reserve(item(2), b"3" * 32, repeat_key="key")
    again = ledger.reserve(item(2), b"4" * 32, repeat_key="key")
    assert isinstance(again, Reservation)
    assert again.secret == same.secret == b"3" * 32


def test_a_ledger_knows_its_charges(ledger):
    name = item().charge_id(ledger.genesis.ledger_id)
    assert not ledger.knows(name)
    ledger.reserve(item(), bytes(32))
    assert ledger.knows(name)
