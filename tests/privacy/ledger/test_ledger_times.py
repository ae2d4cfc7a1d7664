"""Times in a ledger: an export must not show how long work on private data took."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from ledger_samples import entries_of, new_ledger, open_ledger, request

from conclave.privacy.ledger import ChargeAbandonedError, Reservation
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history


@pytest.fixture
def clock(monkeypatch):
    """Let time pass by hand: each call of ``clock(seconds)`` moves it on."""
    now = [datetime(2030, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr("conclave.privacy.ledger.store.utc_now", lambda: now[0].isoformat(timespec="seconds"))

    def advance(seconds: int) -> None:
        now[0] += timedelta(seconds=seconds)

    return advance


def life(folder, clock, work_s: list[int]) -> list[tuple[str, str]]:
    """A plan whose rounds take so long, a charge given up, the plan's end; return states and times."""
    folder.mkdir()
    ledger = new_ledger(folder)
    ledger.admit(request(), 9)
    for number, seconds in enumerate(work_s, start=1):
        reservation = ledger.reserve(request(number), bytes(32))
        assert isinstance(reservation, Reservation)
        clock(seconds)
        ledger.commit(reservation, b"reply")
    given_up = request(len(work_s) + 1)
    ledger.reserve(given_up, bytes(32))
    clock(work_s[0])
    ledger.close()
    ledger = open_ledger(folder)
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(given_up, bytes(32), repeat_key="another")
    ledger.close_plans("7")
    ledger.close()
    assert audit_history(LedgerFile(folder / "ledger.db")).findings == []
    return [(entry.state, entry.time) for entry in entries_of(folder / "ledger.db")]


def test_how_long_the_work_of_a_plan_took_stands_nowhere(tmp_path, clock, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("conclave.privacy.ledger.store.utc_now", lambda: "2030-01-01T00:00:00+00:00")
        at_once = life(tmp_path / "at-once", clock, [0, 0, 0])
    assert [state for state, _ in at_once] == [
        "ADMITTED", *["RESERVED", "COMMITTED"] * 3, "RESERVED", "ABANDONED", "CLOSED"
    ]  # fmt: skip
    assert life(tmp_path / "slow", clock, [15, 900, 1]) == at_once


def test_a_charge_has_one_time_also_without_a_plan(tmp_path, clock):
    ledger = new_ledger(tmp_path)
    for number in (1, 2):
        reservation = ledger.reserve(request(number), bytes(32))
        clock(14)
        ledger.commit(reservation, b"reply")
    times = [entry.time[-14:-6] for entry in ledger.entries()]
    assert times == ["00:00:00", "00:00:00", "00:00:14", "00:00:14"]


def test_times_go_on_with_the_next_plan(tmp_path, clock):
    ledger = new_ledger(tmp_path)
    ledger.admit(request(), 2)
    clock(60)
    other = {"run_id": "8", "plan_hash": "q" * 64}
    ledger.admit(request(**other), 2)
    clock(5)
    ledger.reserve(request(), bytes(32))
    times = [entry.time for entry in ledger.entries()]
    assert times == sorted(times)
    assert times[1] == times[2] != times[0]


def test_an_admission_that_follows_private_work_has_the_time_of_the_first(tmp_path, clock):
    """A held-out side admits a plan with its first evaluation, which comes when the training before it is done."""
    for folder in ("training", "aside"):
        (tmp_path / folder).mkdir()
    training, aside = new_ledger(tmp_path / "training"), new_ledger(tmp_path / "aside")
    assert training.admitted_at("7", "p" * 64) is None
    training.admit(request(), 2)
    clock(90)
    aside.admit(request(), 2, time=training.admitted_at("7", "p" * 64))
    assert aside.entries()[0].time == training.entries()[0].time
    clock(60)
    later = {"run_id": "8"}
    aside.admit(request(**later), 2)
    aside.admit(request(run_id="9"), 2, time=training.admitted_at("7", "p" * 64))
    times = [entry.time for entry in aside.entries()]
    assert times == sorted(times)  # but never before what came before it
