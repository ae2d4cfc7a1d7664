"""A change of keys, a recovery or a migration that is killed: the ledger is as before it or as after it, never between.

Each is killed before every line that it runs of the files that write.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import in_the_soak_unless
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import KEY, MACHINE, genesis, request, spend
from mortal_node import witness_of
from standing_still import Stops

import conclave.privacy.ledger.store
from conclave.base.errors import BadInputError
from conclave.privacy.ledger import (
    BudgetExhaustedError,
    ChargeAbandonedError,
    Ledger,
    PlanClosedError,
    SignedHead,
    StoredReply,
)
from conclave.privacy.ledger.entry import ENTRY_FIELDS
from conclave.privacy.ledger.genesis import FORMAT_VERSION
from conclave.privacy.ledger.reading.history import LedgerFile, write_export
from conclave.privacy.ledger.reading.verification import LedgerAudit, audit_history
from conclave.privacy.ledger.schema import format_version
from conclave.privacy.ledger.upkeep.recovery import recover

NEW_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
ELSEWHERE = "another machine"
WRITERS = (
    "ledger/store.py",
    "ledger/database.py",
    "recovery.py",
    "derived.py",
    "schema.py",
    "witness.py",
    "base/whole_file.py",
)


def ledger_of(folder: Path) -> Path:
    return folder / "ledger.db"


def audit(folder: Path, receipts: list[SignedHead], *, witnessed: bool = True) -> LedgerAudit:
    witness = witness_of(folder).read()
    assert (witness is not None) == witnessed
    found = audit_history(LedgerFile(ledger_of(folder)), witness=witness, receipts=receipts)
    assert found.findings == []
    return found


def stops_of(work: Callable[[], object]) -> Stops:
    """Do ``work`` in a child that stops before the first turn of each line of the files that write."""
    return Stops(work, lambda step: step[0].endswith(WRITERS))


def kill_everywhere(template: Path, work: Callable[[Path], object], check: Callable[[Path], None]) -> None:
    """Check what a kill of ``work`` leaves of a folder, before each line at its first turn.

    One process does the work and stands still before each. What it has then in its files is what a kill would leave;
    :func:`test_a_kill_leaves_what_a_process_has_that_stands_still` holds that against true kills.
    """
    worked, left = template.with_name("worked"), template.with_name("left")
    shutil.copytree(template, worked)
    with stops_of(lambda: work(worked)) as stops:
        for step in stops:
            shutil.copytree(worked, left)
            try:
                check(left)
            except BaseException as error:
                error.add_note(f"killed before {step}")
                raise
            shutil.rmtree(left)
    assert len(stops.seen) == len(set(stops.seen)) > 50
    shutil.rmtree(worked)
    print(f"killed before {len(stops.seen)} lines")


@pytest.fixture
def spent(tmp_path):
    """A deployed ledger with two charges, and the receipts that it gave."""
    folder = tmp_path / "ledger"
    ledger = Ledger.create(ledger_of(folder), genesis(mode="deployment"), KEY, witness=witness_of(folder))
    spend(ledger, 2)
    receipts = [ledger.head]
    ledger.close()
    return folder, receipts


def opened(folder: Path, key: Ed25519PrivateKey) -> Ledger:
    return Ledger(ledger_of(folder), key, witness=witness_of(folder), machine=MACHINE)


def rotate(folder: Path) -> None:
    ledger = opened(folder, KEY)
    ledger.rotate_key(NEW_KEY)
    ledger.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_kill_leaves_what_a_process_has_that_stands_still(spent):
    """Every twentieth line is died at in earnest: byte for byte the files are those that were copied before."""
    folder, _ = spent
    before = files_of(folder)
    changed = turn = 0
    while True:
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        with stops_of(lambda copy=copy: rotate(copy)) as stops:
            reached = next(itertools.islice(stops, turn, None), None)
            if reached is None:
                break
            had = files_of(copy)
            stops.kill()
        assert files_of(copy) == had
        changed += had != before
        shutil.rmtree(copy)
        turn += 20
    assert turn > 50
    assert changed > 1


def test_a_killed_change_of_keys(spent):
    folder, receipts = spent

    def check(copy: Path) -> None:
        key, other = (NEW_KEY, KEY) if audit(copy, receipts).rotations else (KEY, NEW_KEY)
        with pytest.raises(BadInputError, match="was signed with another key"):
            opened(copy, other)
        ledger = opened(copy, key)
        if key is KEY:
            ledger.rotate_key(NEW_KEY)
        spend(ledger, 1)
        receipt = ledger.head
        ledger.close()
        found = audit(copy, [*receipts, receipt])
        assert (found.rotations, found.charges) == (1, 3)

    kill_everywhere(folder, rotate, check)


@pytest.mark.parametrize("evidence", in_the_soak_unless([True], [False, True]))
def test_a_killed_recovery(spent, evidence):
    """A backup from before the last two charges, on a new machine; with evidence an export proves what came after."""
    folder, receipts = spent
    backup = folder.with_name("backup")
    shutil.copytree(folder, backup)
    ledger = Ledger(ledger_of(folder), KEY, witness=witness_of(folder), machine=MACHINE)
    ledger.admit(request(), 4)  # the two charges before were of the same plan
    spend(ledger, 2)
    receipts = [*receipts, ledger.head]
    ledger.close()
    shutil.copytree(folder / "elsewhere", backup / "elsewhere", dirs_exist_ok=True)
    with (backup / "export").open("wb") as out:
        write_export(LedgerFile(ledger_of(folder)), out)

    def begin_again(copy: Path) -> None:
        proof = copy / "export" if evidence else None
        recover(ledger_of(copy), KEY, witness=witness_of(copy), machine=ELSEWHERE, evidence=proof)

    def open_and_audit(copy: Path) -> LedgerAudit:
        ledger = Ledger(ledger_of(copy), KEY, witness=witness_of(copy), machine=ELSEWHERE)
        with pytest.raises(PlanClosedError if evidence else BudgetExhaustedError):
            ledger.admit(request(), 2)
        ledger.close()
        found = audit(copy, receipts)
        assert found.restored >= 1
        return found

    def check(copy: Path) -> None:
        if any(json.loads(line)["state"] == "RESTORED" for line in LedgerFile(ledger_of(copy)).lines()):
            with contextlib.suppress(BadInputError):  # refused until the witness follows
                open_and_audit(copy)
        else:
            with pytest.raises(BadInputError, match="belongs to another machine"):
                open_and_audit(copy)
        begin_again(copy)
        found = open_and_audit(copy)
        genesis_ = LedgerFile(ledger_of(copy)).genesis
        totals = [int(json.loads(line)["rdp_total"]) for line in LedgerFile(ledger_of(copy)).lines()]
        assert found.unproven is not evidence
        if evidence:
            assert (found.charges, totals[-1]) == (4, totals[8])
        else:  # all that was left, once
            assert (found.charges, totals[-1]) == (2, int(genesis_.rdp_budget))

    kill_everywhere(backup, begin_again, check)


V1_TABLES = f"""
CREATE TABLE genesis (document TEXT NOT NULL);
CREATE TABLE entries ({", ".join(ENTRY_FIELDS)}, entry_hash, signature,
    PRIMARY KEY (seq), UNIQUE (charge_id, state)) WITHOUT ROWID;
CREATE TABLE secrets (charge_id TEXT PRIMARY KEY, secret BLOB NOT NULL, attempts INTEGER NOT NULL);
CREATE TABLE replies (charge_id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries never change'); END;
CREATE TRIGGER entries_never_go BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries are never deleted'); END;
PRAGMA user_version = 1;
"""
V1_SECRET = b"a secret of version 1, 32 bytes "


def make_v1(folder: Path) -> list[str]:
    """Write a ledger as version 1 did: one charge with its reply, one that a crash interrupted. Return the hashes."""
    drawn = folder.with_name("drawn")
    ledger = Ledger.create(ledger_of(drawn), genesis(), KEY)
    spend(ledger, 1, body=b"first")
    ledger.reserve(request(2), V1_SECRET)
    entries = ledger.entries()
    ledger.close()
    first = replace(ledger.genesis, version=1)
    folder.mkdir()
    db = sqlite3.connect(ledger_of(folder), isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(V1_TABLES)
    db.execute("INSERT INTO genesis VALUES (?)", (first.line.decode(),))
    hashes = [first.hash]
    for entry in entries:
        old = replace(entry, version=1, prev_hash=hashes[-1])
        hashes.append(old.hash)
        marks = ", ".join("?" * (len(ENTRY_FIELDS) + 2))
        db.execute(f"INSERT INTO entries VALUES ({marks})", (*asdict(old).values(), old.hash, ""))
    db.execute("INSERT INTO secrets VALUES (?, ?, 1)", (entries[-1].charge_id, V1_SECRET))
    db.execute("INSERT INTO replies VALUES (?, ?)", (entries[0].charge_id, b"first"))
    db.close()
    return hashes


def version_of(folder: Path) -> int:
    db = sqlite3.connect(ledger_of(folder))
    (version,) = db.execute("PRAGMA user_version").fetchone()
    db.close()
    return version


def test_a_killed_migration(tmp_path):
    folder = tmp_path / "ledger"
    hashes = make_v1(folder)
    seen = set()

    def migrate(copy: Path) -> None:
        Ledger(ledger_of(copy), KEY).close()

    def check(copy: Path) -> None:
        seen.add(version_of(copy))
        ledger = Ledger(ledger_of(copy), KEY)
        assert [ledger.genesis.hash, *(entry.hash for entry in ledger.entries())][: len(hashes)] == hashes
        assert [entry.state for entry in ledger.entries()] == ["RESERVED", "COMMITTED", "RESERVED", "MIGRATED"]
        again = ledger.reserve(request(), bytes(32))
        assert isinstance(again, StoredReply)
        assert again.body == b"first"
        assert again.receipt.signed_by(ledger.genesis.public_key)
        with pytest.raises(ChargeAbandonedError):  # it was reserved under other code
            ledger.reserve(request(2), bytes(32), repeat_key="this code")
        assert not any(V1_SECRET in path.read_bytes() for path in copy.iterdir())
        ledger.close()
        found = audit(copy, [again.receipt], witnessed=False)
        assert (found.charges, found.committed, found.abandoned) == (2, 1, 1)

    kill_everywhere(folder, migrate, check)
    assert seen == {1, FORMAT_VERSION}


def test_two_processes_may_migrate_at_once(tmp_path, monkeypatch):
    """The second one finds, once it may write, that there is nothing left to do."""
    folder = tmp_path / "ledger"
    make_v1(folder)
    found = []

    def overtaken(db: sqlite3.Connection) -> int:
        found.append(format_version(db))
        if len(found) == 1:
            Ledger(ledger_of(folder), KEY).close()
        return found[-1]

    monkeypatch.setattr(conclave.privacy.ledger.store, "format_version", overtaken)
    Ledger(ledger_of(folder), KEY).close()
    assert found[0] == 1
    assert audit(folder, [], witnessed=False).entries == 4


def test_a_migration_with_another_key_leaves_the_file_as_it_was(tmp_path):
    folder = tmp_path / "ledger"
    make_v1(folder)
    with pytest.raises(BadInputError, match="was signed with another key"):
        Ledger(ledger_of(folder), NEW_KEY)
    assert version_of(folder) == 1
    Ledger(ledger_of(folder), KEY).close()
    assert audit(folder, [], witnessed=False).entries == 4
