"""The ledger: charge first, release once, lose nothing."""

from __future__ import annotations

import multiprocessing
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from ledger_samples import KEY, genesis, new_ledger, open_ledger, request, spend

from conclave.base.canonical import canonical_json, decimal, sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import (
    BudgetExhaustedError,
    ChargeAbandonedError,
    Ledger,
    ReplyExpiredError,
    Reservation,
    StoredReply,
)
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.witness import Witness


def test_a_charge_is_on_disk_before_its_output_exists(tmp_path):
    ledger = new_ledger(tmp_path)
    reservation = ledger.reserve(request(), b"s" * 32)
    with sqlite3.connect(tmp_path / "ledger.db") as other:  # another connection sees it already
        assert other.execute("SELECT state, json_extract(body, '$.rdp_charge') FROM entries").fetchall() == [
            ("RESERVED", ledger.entries()[0].rdp_charge)
        ]
    expected = charge_units(SampledGaussian(sampling_rate=0.5, noise_multiplier=2.0, steps=1), 3.4)
    assert int(ledger.entries()[0].rdp_charge) == expected
    assert reservation.secret == b"s" * 32
    assert [path for path in tmp_path.iterdir() if b"s" * 32 in path.read_bytes()]


def test_commit_stores_the_reply_erases_the_secret_and_costs_nothing_more(tmp_path):
    ledger = new_ledger(tmp_path)
    reservation = ledger.reserve(request(), b"s" * 32)
    spent = ledger.epsilon_spent
    assert ledger.commit(reservation, b"the reply").body == b"the reply"
    entries = ledger.entries()
    assert [entry.state for entry in entries] == ["RESERVED", "COMMITTED"]
    assert entries[1].output_hash == sha256(b"the reply")
    assert ledger.epsilon_spent == spent
    with sqlite3.connect(tmp_path / "ledger.db") as other:
        assert other.execute("SELECT count(*) FROM secrets").fetchone() == (0,)
    assert not [path for path in tmp_path.iterdir() if b"s" * 32 in path.read_bytes()]


def test_a_redelivered_request_gets_the_stored_bytes_and_costs_nothing(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1, body=b"first")
    spent = ledger.epsilon_spent
    again = ledger.reserve(request(), b"x" * 32)
    assert isinstance(again, StoredReply)
    assert again.body == b"first"
    assert ledger.epsilon_spent == spent
    assert len(ledger.entries()) == 2


def test_other_content_is_another_charge(tmp_path):
    base = request().charge_id("ledger")
    changed = [
        request(2),
        request(run_id="8"),
        request(plan_hash="q" * 64),
        request(model_in_hash="n" * 64),
        request(kind="evaluate"),
    ]
    assert len({base, *(item.charge_id("ledger") for item in changed), request().charge_id("other")}) == 7


def test_after_a_crash_the_first_secret_is_used_and_only_twice(tmp_path):
    ledger = new_ledger(tmp_path)
    ledger.reserve(request(), b"1" * 32)
    ledger.close()
    ledger = open_ledger(tmp_path)  # the process died between reserve and commit
    spent = ledger.epsilon_spent
    second = ledger.reserve(request(), b"2" * 32)
    assert isinstance(second, Reservation)
    assert second.secret == b"1" * 32  # fresh randomness would be a second release
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(request(), b"3" * 32)
    assert [entry.state for entry in ledger.entries()] == ["RESERVED", "ABANDONED"]
    assert ledger.epsilon_spent == spent > 0  # abandoned stays spent
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(request(), b"4" * 32)
    with pytest.raises(ValueError, match="no reservation"):
        ledger.commit(second, b"too late")


def test_the_loser_of_a_race_returns_the_winners_bytes(tmp_path):
    ledger = new_ledger(tmp_path)
    winner = ledger.reserve(request(), b"1" * 32)
    loser = ledger.reserve(request(), b"2" * 32)
    assert ledger.commit(winner, b"winner").body == b"winner"
    assert ledger.commit(loser, b"loser").body == b"winner"
    assert [entry.state for entry in ledger.entries()] == ["RESERVED", "COMMITTED"]


def test_a_commit_without_a_reservation_is_refused(tmp_path):
    ledger = new_ledger(tmp_path)
    with pytest.raises(ValueError, match="no reservation"):
        ledger.commit(Reservation("f" * 64, request(), b""), b"unpaid")
    assert ledger.entries() == []


def test_the_budget_is_never_exceeded_and_a_refusal_writes_nothing(tmp_path):
    ledger = new_ledger(tmp_path, epsilon=3.0)
    with pytest.raises(BudgetExhaustedError):
        spend(ledger, 10_000)
    spent, written = ledger.epsilon_spent, len(ledger.entries())
    assert 2.0 < spent <= 3.0
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(request(9999), bytes(32))
    assert (ledger.epsilon_spent, len(ledger.entries())) == (spent, written)
    price = charge_units(SampledGaussian(sampling_rate=0.5, noise_multiplier=2.0, steps=1), 6.5)
    total, budget = int(ledger.entries()[-1].rdp_total), int(ledger.genesis.rdp_budget)
    assert total <= budget < total + price
    spend(ledger, 1, sigma=500.0)  # a cheaper charge still fits


def _try_to_spend(path, start, results):
    ledger = Ledger(path, KEY)
    start.wait()
    try:
        ledger.reserve(request(1000 + multiprocessing.current_process()._identity[0]), bytes(32))
        results.put("won")
    except BudgetExhaustedError:
        results.put("refused")


def test_processes_race_for_the_last_of_the_budget_and_one_wins(tmp_path):
    ledger = new_ledger(tmp_path, epsilon=3.0)
    price = charge_units(SampledGaussian(sampling_rate=0.5, noise_multiplier=2.0, steps=1), 6.5)
    spend(ledger, int(ledger.genesis.rdp_budget) // price - 1)
    ledger.close()
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_try_to_spend, args=(tmp_path / "ledger.db", start, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    outcomes = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["won"]


def test_no_privacy_costs_infinity_and_exists_in_simulation_only(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1, sigma=None)
    assert ledger.epsilon_spent == float("inf")
    spend(ledger, 1, sigma=None)
    with pytest.raises(BudgetExhaustedError):  # nothing private fits after everything was given away
        ledger.reserve(request(50), bytes(32))
    witness = Witness(tmp_path / "witness")
    deployed = Ledger.create(tmp_path / "deployed.db", genesis(mode="deployment"), KEY, witness=witness)
    for bad in (request(sigma=None), request(rng="seeded")):
        with pytest.raises(BadInputError, match="simulation only"):
            deployed.reserve(bad, bytes(32))
    assert deployed.entries() == []


def test_entries_can_be_neither_changed_nor_deleted(tmp_path):
    spend(new_ledger(tmp_path), 1)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        with pytest.raises(sqlite3.IntegrityError, match="never change"):
            db.execute("UPDATE entries SET hash = '0'")
        with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
            db.execute("DELETE FROM entries")


def test_a_pruned_reply_is_expired_not_recomputed(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("DELETE FROM replies")
    with pytest.raises(ReplyExpiredError):
        ledger.reserve(request(), bytes(32))


def test_the_file_is_its_owners_alone_and_is_never_overwritten(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    with pytest.raises(BadInputError, match="exists already"):
        new_ledger(tmp_path)


def test_canonical_json_refuses_floats_and_sorts_keys():
    assert canonical_json({"b": 1, "a": ["x"]}) == b'{"a":["x"],"b":1}'
    with pytest.raises(TypeError):
        canonical_json({"a": [0.5]})
    assert [decimal(v) for v in (8.0, 1e-5, 0.1, 1.958348, 1e22)] == [
        "8", "0.00001", "0.1", "1.958348", "10000000000000000000000",
    ]  # fmt: skip


def test_threads_may_share_an_open_ledger(tmp_path):
    witness = Witness(tmp_path / "witness")
    ledger = new_ledger(tmp_path, epsilon=200.0, witness=witness)

    def work(number):
        for turn in range(5):
            reservation = ledger.reserve(request(1 + number * 5 + turn), bytes([number]) * 32)
            assert ledger.commit(reservation, bytes([number, turn])).body == bytes([number, turn])
            assert witness.read().seq <= ledger.head.seq

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    ledger.close()
    audit = audit_history(LedgerFile(tmp_path / "ledger.db"), witness=witness.read())
    assert (audit.findings, audit.committed) == ([], 40)
