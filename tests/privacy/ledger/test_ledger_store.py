"""The ledger file: what is not one, whose it is, where it may lie, and how older formats and keys are replaced."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from dataclasses import asdict, replace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from ledger_samples import KEY, MACHINE, genesis, new_ledger, open_ledger, request, spend
from ledger_tampering import NEW_KEY, STRANGER, Forger, edit

from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError
from conclave.privacy.ledger import (
    ChargeAbandonedError,
    Ledger,
    LedgerMismatchError,
    Reservation,
    SignedHead,
    StoredReply,
    schema,
)
from conclave.privacy.ledger import machine as this_machine
from conclave.privacy.ledger.entry import ENTRY_FIELDS
from conclave.privacy.ledger.heads import current_key, public_hex
from conclave.privacy.ledger.keys import create_key, load_key
from conclave.privacy.ledger.machine import machine_id
from conclave.privacy.ledger.reading.history import LedgerFile, open_history
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.upkeep import registry
from conclave.privacy.ledger.upkeep.recovery import recover
from conclave.privacy.ledger.witness import Witness

CHEAP = request(sigma=20.0)


def deployed(folder, **options) -> Ledger:
    return new_ledger(folder, mode="deployment", witness=Witness(folder / "witness" / "head.json"), **options)


def reopened(folder, **options) -> Ledger:
    return open_ledger(folder, **({"witness": Witness(folder / "witness" / "head.json"), "machine": MACHINE} | options))


# What is no ledger.


@pytest.mark.parametrize("read", [lambda path: Ledger(path, KEY), LedgerFile, open_history])
def test_what_is_no_ledger_is_refused(tmp_path, read):
    with pytest.raises(BadInputError):
        read(tmp_path / "missing")
    with pytest.raises(BadInputError):
        read(tmp_path)
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one\n" * 100)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "header").write_bytes(b"SQLite format 3\0" + bytes(500))
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    for name in ("text", "empty", "header", "other.db"):
        with pytest.raises(BadInputError):
            read(tmp_path / name)


@pytest.mark.parametrize("version", [0, 3, 99, -1])
def test_a_format_of_another_conclave_is_refused_and_left_alone(tmp_path, version):
    new_ledger(tmp_path).close()
    edit(tmp_path / "ledger.db", f"PRAGMA user_version = {version}")
    before = (tmp_path / "ledger.db").read_bytes()
    for read in (lambda path: Ledger(path, KEY), LedgerFile):
        with pytest.raises(BadInputError, match=f"version {version}"):
            read(tmp_path / "ledger.db")
    assert (tmp_path / "ledger.db").read_bytes() == before


def test_a_file_that_is_there_is_never_replaced(tmp_path):
    (tmp_path / "ledger.db").write_text("something else")
    with pytest.raises(BadInputError, match="exists already"):
        new_ledger(tmp_path)
    assert (tmp_path / "ledger.db").read_text() == "something else"
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.db"]


def test_a_ledger_is_opened_and_begun_with_its_own_key(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1)
    ledger.close()
    with pytest.raises(BadInputError, match="another key"):
        Ledger(tmp_path / "ledger.db", STRANGER)
    with pytest.raises(BadInputError, match="names another key"):
        Ledger.create(tmp_path / "new.db", genesis(), STRANGER)
    with pytest.raises(BadInputError, match="names another key"):
        Ledger.create(tmp_path / "new.db", replace(genesis(), ledger_id="0" * 32), KEY)
    assert not (tmp_path / "new.db").exists()


def test_every_file_is_its_owners_alone(tmp_path):
    old = os.umask(0)
    try:
        ledger = deployed(tmp_path)
        with ledger.lease():
            ledger.reserve(CHEAP, bytes(32))
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        names = {path.name for path in files}
    finally:
        os.umask(old)
    assert names == {"ledger.db", "ledger.db-wal", "ledger.db-shm", "ledger.db.lock", "head.json", "head.json.lock"}
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


# Where it may lie.


def test_a_deployment_opens_on_its_machine_with_its_witness_only(tmp_path):
    ledger = deployed(tmp_path)
    spend(ledger, 1)
    ledger.close()
    for bad, words in (
        ({"machine": "other"}, "another machine"),
        ({"machine": None}, "another machine"),
        ({"witness": None}, "has no witness"),
        ({"witness": Witness(tmp_path / "nowhere")}, "is missing"),
    ):
        with pytest.raises(BadInputError, match=words):
            reopened(tmp_path, **bad)
    assert not (tmp_path / "nowhere").exists()
    reopened(tmp_path).close()


def test_the_witness_must_be_of_this_history(tmp_path):
    ledger = deployed(tmp_path)
    spend(ledger, 1)
    head = ledger.head
    ledger.close()
    witness = Witness(tmp_path / "witness" / "head.json")
    name = head.ledger_id
    for seen, words in (
        (SignedHead.sign(KEY, name, 3, "e" * 64), "older copy"),
        (SignedHead.sign(KEY, name, 2, "e" * 64), "another history"),
        (SignedHead.sign(KEY, name, 0, "e" * 64), "another history"),
        (SignedHead.sign(KEY, "0" * 32, 2, head.hash), "another history"),
        (SignedHead.sign(KEY, "0" * 32, 99, head.hash), "older copy"),
    ):
        witness.mirror(lambda seen=seen: seen)
        with pytest.raises(BadInputError, match=words):
            reopened(tmp_path)
        assert witness.read() == seen
    for content in ("", "{}", "[]", '{"seq":1}', "x" * 1000):
        witness.path.write_text(content)
        with pytest.raises(BadInputError, match="not a witness"):
            reopened(tmp_path)
    witness.mirror(lambda: head)
    with pytest.raises(BadInputError, match="witness of a ledger already"):
        Ledger.create(tmp_path / "new.db", genesis(), KEY, witness=witness)


def test_a_witness_that_fell_behind_follows_again(tmp_path):
    ledger = deployed(tmp_path)
    behind = ledger.head
    spend(ledger, 1)
    witness = Witness(tmp_path / "witness" / "head.json")
    witness.mirror(lambda: behind)  # a crash between the database and the witness
    assert isinstance(ledger.reserve(request(), bytes(32)), StoredReply)  # nothing new, yet it follows before the reply
    assert witness.read() == ledger.head
    witness.mirror(lambda: behind)
    ledger.close()
    ledger = reopened(tmp_path)
    assert witness.read() == ledger.head


def test_the_witness_is_written_before_anyone_can_act_on_a_charge(tmp_path):
    ledger = deployed(tmp_path)
    witness = Witness(tmp_path / "witness" / "head.json")
    reservation = ledger.reserve(CHEAP, bytes(32))
    assert witness.read() == ledger.head
    receipt = ledger.commit(reservation, b"reply").receipt
    assert witness.read() == receipt == ledger.head


def test_a_charge_whose_witness_cannot_be_written_is_not_handed_out(tmp_path, monkeypatch):
    ledger = deployed(tmp_path)

    def broken(self, latest):
        raise BadInputError("cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(Witness, "mirror", broken)
        with pytest.raises(BadInputError, match="cannot be written"):
            ledger.reserve(CHEAP, b"1" * 32)
    assert ledger.epsilon_spent > 0  # spent, and the work may still be done
    again = ledger.reserve(CHEAP, b"2" * 32)
    assert isinstance(again, Reservation)
    assert again.secret == b"1" * 32
    assert Witness(tmp_path / "witness" / "head.json").read() == ledger.head


# One ledger a dataset.


@pytest.mark.parametrize("strange", [0, 1, 2])
def test_a_claim_is_for_names_and_paths_that_are_text(tmp_path, strange):
    claimed = ["digits", tmp_path / "data", tmp_path / "a.db"]
    claimed[strange] = ("caf\udce9", tmp_path / "caf\udce9", tmp_path / "caf\udce9.db")[strange]
    with pytest.raises(BadInputError, match=r"caf\\udce9.* is no text in UTF-8"):
        registry.claim(tmp_path / "claims", *claimed)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_has_one_ledger_by_name_and_by_place(tmp_path):
    folder = tmp_path / "state" / "claims"
    ledger, other = tmp_path / "a.db", tmp_path / "b.db"
    registry.claim(folder, "digits", tmp_path / "data", ledger)
    registry.claim(folder, "digits", tmp_path / "data", ledger)  # again changes nothing
    with pytest.raises(BadInputError, match="dataset digits has a ledger already"):
        registry.claim(folder, "digits", tmp_path / "elsewhere", other)
    with pytest.raises(BadInputError, match=r"data .* has a ledger already"):
        registry.claim(folder, "renamed", tmp_path / "data", other)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInputError, match="has a ledger already"):
        registry.claim(folder, "linked", tmp_path / "link", other)
    registry.claim(folder, "renamed", tmp_path / "more", other)  # what was refused left the name free
    assert len(list(folder.iterdir())) == 4
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_and_what_is_in_it_are_one_dataset(tmp_path):
    folder, ledger, other = tmp_path / "claims", tmp_path / "a.db", tmp_path / "b.db"
    registry.claim(folder, "one", tmp_path / "data" / "rows.csv", ledger)
    for overlapping in (tmp_path / "data", tmp_path, tmp_path / "data" / "rows.csv" / "part"):
        with pytest.raises(BadInputError, match=r"overlap with .*rows\.csv, which have a ledger already"):
            registry.claim(folder, "two", overlapping, other)
    registry.claim(folder, "two", tmp_path / "data" / "more.csv", other)


def test_a_claim_that_cannot_be_written_or_read_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot be written"):
        registry.claim(tmp_path / "file" / "claims", "digits", tmp_path / "data", tmp_path / "a.db")
    registry.claim(tmp_path / "claims", "digits", tmp_path / "data", tmp_path / "a.db")
    for path in (tmp_path / "claims").iterdir():
        path.write_text("torn")
    with pytest.raises(BadInputError, match="unreadable claim"):
        registry.claim(tmp_path / "claims", "digits", tmp_path / "data", tmp_path / "a.db")


def test_claims_are_taken_back_where_they_are_new(tmp_path):
    folder, ledger, other = tmp_path / "claims", tmp_path / "a.db", tmp_path / "b.db"
    claims = registry.claim(folder, "one", tmp_path / "data", ledger)
    assert sorted(claims) == sorted(folder.iterdir())
    assert registry.claim(folder, "one", tmp_path / "data", ledger) == []
    registry.withdraw(claims)
    registry.claim(folder, "one", tmp_path / "data", other)


def test_a_claim_on_a_full_disk_is_none(tmp_path, monkeypatch):
    folder, ledger, other = tmp_path / "claims", tmp_path / "a.db", tmp_path / "b.db"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: os.write(-1, b""))
        with pytest.raises(BadInputError, match="cannot be written"):
            registry.claim(folder, "one", tmp_path / "data", ledger)
    registry.claim(folder, "one", tmp_path / "data", other)


def test_the_registry_lies_in_the_users_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert registry.default_registry() == tmp_path / "conclave" / "datasets"
    monkeypatch.setenv("HOME", str(tmp_path))
    for nowhere in ("", "relative/to/whoever/asks", None):
        if nowhere is None:
            monkeypatch.delenv("XDG_STATE_HOME")
        else:
            monkeypatch.setenv("XDG_STATE_HOME", nowhere)
        assert registry.default_registry() == tmp_path / ".local" / "state" / "conclave" / "datasets"


# Keys and machines.


def test_a_key_is_written_once_and_read_by_its_owner_only(tmp_path):
    path = tmp_path / "keys" / "ledger.pem"
    key = create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_hex(load_key(path)) == public_hex(key)
    with pytest.raises(BadInputError, match="new file"):
        create_key(path)
    for mode in (0o644, 0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(BadInputError, match=f"mode {mode:04o}"):
            load_key(path)


def test_a_crash_leaves_a_whole_key_or_none(tmp_path, monkeypatch):
    path = tmp_path / "ledger.key"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            create_key(path)
    assert not path.exists()
    assert public_hex(create_key(path)) == public_hex(load_key(path))


def test_what_is_no_ledger_key_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read"):
        load_key(tmp_path / "missing")
    private = rsa.generate_private_key(65537, 2048)
    public = KEY.public_key()
    wrong = {
        "text": b"no key",
        "empty": b"",
        "rsa": private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "public": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "locked": KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")),
    }
    for name, content in wrong.items():
        path = tmp_path / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        with pytest.raises(BadInputError, match="must be an Ed25519 private key"):
            load_key(path)


def test_a_machine_is_named_by_a_hash(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(this_machine, "_FILES", (first, second))
    with pytest.raises(BadInputError, match="must state one"):
        machine_id()
    second.write_text("  abc\n")
    named = machine_id()
    assert named == machine_id("abc") == machine_id()
    assert len(named) == 32
    assert "abc" not in named
    first.write_text("\n")  # empty: as good as none
    assert machine_id() == named
    first.write_text("def\n")
    assert machine_id() != named
    assert machine_id("abc") == named


# Another key.


def test_a_rotated_ledger_opens_with_its_new_key_only(tmp_path):
    ledger = deployed(tmp_path)
    spend(ledger, 1)
    early = ledger.head
    rotation = ledger.rotate_key(NEW_KEY)
    assert ledger.rotations == [rotation]
    spend(ledger, 1)
    late, spent = ledger.head, ledger.epsilon_spent
    ledger.close()
    with pytest.raises(BadInputError, match="another key"):
        reopened(tmp_path)
    witness = Witness(tmp_path / "witness" / "head.json")
    again = Ledger(tmp_path / "ledger.db", NEW_KEY, witness=witness, machine=MACHINE)
    assert again.epsilon_spent == spent
    assert again.holds(early)
    assert again.holds(late)
    assert early.signed_by(public_hex(KEY))
    assert late.signed_by(public_hex(NEW_KEY))
    assert not late.signed_by(public_hex(KEY))
    name = again.genesis.ledger_id
    assert current_key(name, again.genesis.public_key, again.rotations) == again.current_key == public_hex(NEW_KEY)
    result = audit_history(LedgerFile(again.path), witness=witness.read(), receipts=[early, late])
    assert (result.findings, result.rotations) == ([], 1)


def test_a_rotation_that_fails_leaves_the_old_key_in_use(tmp_path, monkeypatch):
    ledger = deployed(tmp_path)
    spend(ledger, 1)
    before = ledger.head

    def broken(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_stand", broken)
        with pytest.raises(OSError, match="no space"):
            ledger.rotate_key(NEW_KEY)
    assert ledger.head == before
    assert (ledger.rotations, ledger.current_key) == ([], public_hex(KEY))
    spend(ledger, 1)
    ledger.close()
    assert audit_history(LedgerFile(tmp_path / "ledger.db")).findings == []
    reopened(tmp_path).close()


def test_a_rotation_that_only_the_witness_missed_is_in_force(tmp_path, monkeypatch):
    ledger = deployed(tmp_path)

    def broken(self, latest):
        raise BadInputError("cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(Witness, "mirror", broken)
        with pytest.raises(BadInputError, match="cannot be written"):
            ledger.rotate_key(NEW_KEY)
    assert ledger.current_key == public_hex(NEW_KEY)
    spend(ledger, 1)
    assert audit_history(LedgerFile(ledger.path)).findings == []


def test_whoever_has_the_ledger_open_during_a_rotation_signs_nothing_more(tmp_path):
    ledger, other = new_ledger(tmp_path), open_ledger(tmp_path)
    ledger.rotate_key(NEW_KEY)
    with pytest.raises(LedgerMismatchError, match="another key by now"):
        other.reserve(CHEAP, bytes(32))
    assert ledger.reserve(CHEAP, bytes(32))
    assert audit_history(LedgerFile(ledger.path)).findings == []


def test_a_key_is_never_used_again(tmp_path):
    ledger = new_ledger(tmp_path)
    for used in (KEY, NEW_KEY):
        if used is NEW_KEY:
            ledger.rotate_key(NEW_KEY)
        with pytest.raises(BadInputError, match="signed with this key before"):
            ledger.rotate_key(used)
    with pytest.raises(BadInputError, match="signed with this key before"):
        ledger.rotate_key(KEY)
    ledger.rotate_key(STRANGER)
    ledger.close()
    Ledger(tmp_path / "ledger.db", STRANGER).close()


# From version 1.


def version_1(path) -> tuple[list[bytes], SignedHead]:
    """Write a file as version 1 did: two charges, one committed, one pending with its secret."""
    first = replace(genesis(), version=1)
    forger = Forger(first)
    other = request(2, sigma=20.0)
    for item, state in ((CHEAP, "RESERVED"), (CHEAP, "COMMITTED"), (other, "RESERVED")):
        hashed = sha256(b"reply") if state == "COMMITTED" else ""
        forger.charge(item, state, version=1, output_hash=hashed)
    db = sqlite3.connect(path)
    columns = ", ".join([*ENTRY_FIELDS, "entry_hash", "signature"])
    db.executescript(f"""
        CREATE TABLE genesis (document TEXT NOT NULL);
        CREATE TABLE entries ({columns}, PRIMARY KEY (seq), UNIQUE (charge_id, state)) WITHOUT ROWID;
        CREATE TABLE secrets (charge_id TEXT PRIMARY KEY, secret BLOB NOT NULL, attempts INTEGER NOT NULL);
        CREATE TABLE replies (charge_id TEXT PRIMARY KEY, body BLOB NOT NULL);
        CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries
            BEGIN SELECT RAISE(ABORT, 'ledger entries never change'); END;
        CREATE TRIGGER entries_never_go BEFORE DELETE ON entries
            BEGIN SELECT RAISE(ABORT, 'ledger entries are never deleted'); END;
        PRAGMA user_version = 1;
    """)
    db.execute("INSERT INTO genesis VALUES (?)", (first.line.decode(),))
    for entry in forger.entries:
        row = [*asdict(entry).values(), entry.hash, ""]
        db.execute(f"INSERT INTO entries VALUES ({', '.join('?' * len(row))})", row)
    name = forger.genesis.ledger_id
    db.execute("INSERT INTO replies VALUES (?, ?)", (CHEAP.charge_id(name), b"reply"))
    db.execute("INSERT INTO secrets VALUES (?, ?, 1)", (other.charge_id(name), b"1" * 32))
    db.commit()
    db.execute("PRAGMA journal_mode = WAL").fetchone()
    db.close()
    return [entry.line for entry in forger.entries], forger.head


def test_a_version_1_file_is_brought_to_this_format_and_keeps_its_hashes(tmp_path):
    lines, head = version_1(tmp_path / "ledger.db")
    with pytest.raises(BadInputError, match="nodes convert older ones"):
        LedgerFile(tmp_path / "ledger.db")
    ledger = open_ledger(tmp_path)
    assert [entry.line for entry in ledger.entries()][:3] == lines
    migrated = ledger.entries()[3]
    assert migrated.state == "MIGRATED"
    assert json.loads(migrated.mechanism_text) == {"from": 1, "kind": "migration", "to": 2}
    assert (ledger.genesis.version, ledger.genesis.hash) == (1, json.loads(lines[0])["prev_hash"])
    assert ledger.holds(head)
    spent = Forger(ledger.genesis)
    spent.charge(CHEAP).charge(request(2, sigma=20.0))
    audit = audit_history(LedgerFile(ledger.path), receipts=[head])
    assert (audit.findings, audit.charges, audit.committed, audit.pending) == ([], 2, 1, 1)
    assert ledger.epsilon_spent == audit.epsilon == spent.audit().epsilon
    stored = ledger.reserve(CHEAP, bytes(32))
    assert isinstance(stored, StoredReply)
    assert stored.body == b"reply"
    assert stored.receipt.seq == 2
    assert stored.receipt.signed_by(public_hex(KEY))
    pending = ledger.reserve(request(2, sigma=20.0), b"2" * 32)
    assert isinstance(pending, Reservation)
    assert pending.secret == b"1" * 32
    ledger.commit(pending, b"late reply")
    ledger.close()
    open_ledger(tmp_path).close()  # once is enough
    assert [line for line in LedgerFile(tmp_path / "ledger.db").lines() if b"MIGRATED" in line] == [migrated.line]


def test_a_migrated_pending_charge_of_another_environment_is_abandoned(tmp_path):
    version_1(tmp_path / "ledger.db")
    with pytest.raises(ChargeAbandonedError):  # version 1 did not record what its output followed from
        open_ledger(tmp_path).reserve(request(2, sigma=20.0), b"2" * 32, repeat_key="this environment")


@pytest.mark.parametrize("step", range(3))
def test_a_migration_that_fails_leaves_version_1_whole(tmp_path, monkeypatch, step):
    version_1(tmp_path / "ledger.db")
    before = list(sqlite3.connect(tmp_path / "ledger.db").iterdump())

    def broken(*_, **__):
        raise OSError("no space")

    name, target = [("_append", Ledger), ("run_script", schema), ("sha256", schema)][step]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, broken)
        with pytest.raises(OSError, match="no space"):
            open_ledger(tmp_path)
    db = sqlite3.connect(tmp_path / "ledger.db")
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert list(db.iterdump()) == before
    db.close()
    assert len(open_ledger(tmp_path).entries()) == 4


def test_a_version_1_file_is_not_signed_with_another_key(tmp_path):
    version_1(tmp_path / "ledger.db")
    shutil.copy(tmp_path / "ledger.db", tmp_path / "copy.db")
    with pytest.raises(BadInputError, match="another key"):
        Ledger(tmp_path / "ledger.db", STRANGER)
    assert sqlite3.connect(tmp_path / "ledger.db").execute("PRAGMA user_version").fetchone() == (1,)
    open_ledger(tmp_path).close()


def test_an_altered_version_1_file_is_refused(tmp_path):
    version_1(tmp_path / "ledger.db")
    edit(tmp_path / "ledger.db", "UPDATE entries SET rdp_charge = '1' WHERE seq = 1")
    with pytest.raises(BadInputError, match="altered"):
        open_ledger(tmp_path)
    assert sqlite3.connect(tmp_path / "ledger.db").execute("PRAGMA user_version").fetchone() == (1,)


def invented(path, of, entries) -> None:
    """Write a file of version 1, which nobody signs, in the place of a ledger."""
    for left in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        left.unlink(missing_ok=True)
    version_1(path)
    edit(
        path,
        f"UPDATE genesis SET document = '{of.line.decode()}'",
        *(f"DELETE FROM {table}" for table in ("entries", "secrets", "replies")),
    )
    db = sqlite3.connect(path)
    for entry in entries:
        row = [*asdict(entry).values(), entry.hash, ""]
        db.execute(f"INSERT INTO entries VALUES ({', '.join('?' * len(row))})", row)
    db.commit()
    db.close()


@pytest.mark.parametrize("what", ["empty", "cheaper", "simulation", "same genesis", "longer"])
@pytest.mark.parametrize("recovered", [False, True])
def test_an_invented_history_of_version_1_is_never_signed(tmp_path, monkeypatch, what, recovered):
    ledger = deployed(tmp_path)
    spend(ledger, 2)
    true, lines = ledger.genesis, ledger.entries()
    ledger.close()
    of = true if what == "same genesis" else replace(true, version=1)
    if what == "simulation":
        of = replace(of, mode="simulation")
    forger = Forger(of)
    if what != "empty":
        forger.charge(CHEAP, version=1)
    if what == "longer":  # true entries, and one more that nobody saw
        forger.genesis, forger.entries = true, lines
        forger.charge(request(9), version=1)
    path = tmp_path / "ledger.db"
    invented(path, of if what != "longer" else true, forger.entries)
    before, signed = path.read_bytes(), []
    monkeypatch.setattr(SignedHead, "sign", lambda *a: signed.append(a))
    witness = Witness(tmp_path / "witness" / "head.json")
    seen = witness.read()
    with pytest.raises(BadInputError):
        recover(path, KEY, witness=witness, machine=MACHINE) if recovered else reopened(tmp_path)
    assert signed == []
    assert path.read_bytes() == before
    assert witness.read() == seen


@pytest.mark.parametrize("witness", ["missing", "behind", "another's"])
def test_a_version_1_file_is_signed_where_its_witness_saw_its_last_entry(tmp_path, witness):
    _, head = version_1(tmp_path / "ledger.db")
    kept = Witness(tmp_path / "head.json")
    behind = SignedHead.sign(KEY, head.ledger_id, 1, Forger(replace(genesis(), version=1)).charge(CHEAP).head.hash)
    forged = head.model_copy(update={"signature": "0" * 128})
    if witness != "missing":
        kept.mirror(lambda: behind if witness == "behind" else forged)
    with pytest.raises(BadInputError, match="its witness has not seen its last entry"):
        open_ledger(tmp_path, witness=kept)
    kept.mirror(lambda: head)
    open_ledger(tmp_path, witness=kept).close()
    assert kept.read().seq == 4


def test_canonical_spelling_of_a_migrated_genesis(tmp_path):
    version_1(tmp_path / "ledger.db")
    ledger = open_ledger(tmp_path)
    assert ledger.genesis.line == replace(genesis(), version=1, time=ledger.genesis.time).line
