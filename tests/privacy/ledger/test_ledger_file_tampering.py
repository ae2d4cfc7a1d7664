"""The ledger file: what somebody who can write to it, but has no key, gains by changing it."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from dataclasses import asdict, replace

import pytest
from ledger_samples import KEY, MACHINE, genesis, new_ledger, open_ledger, request, spend
from ledger_tampering import STRANGER, Forger, copy_of, edit, ledger_length, long_life

from conclave.base.canonical import canonical_json, sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import (
    BudgetExhaustedError,
    ChargeAbandonedError,
    Genesis,
    KeyRotation,
    Ledger,
    LedgerMismatchError,
    PlanClosedError,
    ReplyExpiredError,
    Reservation,
    SignedHead,
    StoredReply,
)
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.reading.history import open_history
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.witness import Witness

CHEAP = request(sigma=20.0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return long_life(tmp_path_factory.mktemp("life"))


@pytest.fixture
def life(original, tmp_path):
    return copy_of(original, tmp_path / "copy")


def found(path, **options) -> bool:
    try:
        return bool(audit_history(open_history(path), **options).findings)
    except BadInputError:
        return True


def refused(life) -> bool:
    try:
        life.open().close()
    except BadInputError:
        return True
    return False


def test_the_copy_opens_and_holds(life):
    life.open().close()
    assert not found(life.path, witness=life.witness.read(), receipts=life.heads.values())


# Entries.


@pytest.mark.parametrize("seq", [1, 2, 41, 42, 50, 65, 66, 68, 99, 100])
@pytest.mark.parametrize("name", ["rdp_charge", "rdp_total", "state", "charge_id", "mechanism", "time", "prev_hash"])
def test_an_edited_entry_is_found_and_refused(life, seq, name):
    for rehashed in (False, True):
        db = sqlite3.connect(life.path)
        document = json.loads(db.execute("SELECT body FROM entries WHERE seq = ?", (seq,)).fetchone()[0])
        db.close()
        document[name] = f"{document[name]}0"
        body = canonical_json(document).decode()
        spelled = body.replace("'", "''")
        change = f", hash = '{sha256(body.encode())}'" if rehashed else ""
        edit(life.path, f"UPDATE entries SET body = '{spelled}'{change} WHERE seq = {seq}")
        assert found(life.path)
        assert refused(life)


def test_every_deleted_row_is_found_and_refused(original, tmp_path):
    tried = 0
    for seq in range(1, 100):
        path = tmp_path / "ledger.db"
        shutil.copy(original.path, path)
        edit(path, f"DELETE FROM entries WHERE seq = {seq}")
        assert found(path)
        assert refused(replace(original, path=path))
        tried += 1
    assert tried == 99


def test_random_rows_exchanged_or_doubled_are_found_and_refused(original, tmp_path):
    rng = random.Random(1)
    for _ in range(50):
        a, b = rng.sample(range(1, 101), 2)
        path = tmp_path / "ledger.db"
        shutil.copy(original.path, path)
        edit(
            path,
            f"UPDATE entries SET seq = -1 WHERE seq = {a}",
            f"UPDATE entries SET seq = {a} WHERE seq = {b}",
            f"UPDATE entries SET seq = {b} WHERE seq = -1",
        )
        assert found(path)
        assert refused(replace(original, path=path))
        shutil.copy(original.path, path)
        edit(
            path,
            "DROP INDEX one_entry_per_state",
            f"INSERT INTO entries (seq, body, hash, signature) SELECT 101, body, hash, signature FROM entries "
            f"WHERE seq = {a}",
        )
        assert found(path)
        assert refused(replace(original, path=path))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET hash = substr(hash, 2) || substr(hash, 1, 1) WHERE seq = 20",
        "UPDATE entries SET hash = 7 WHERE seq = 20",
        "UPDATE entries SET body = CAST(body AS BLOB) WHERE seq = 20",
        "UPDATE entries SET signature = substr(signature, 2) || substr(signature, 1, 1) WHERE seq = 100",
        "UPDATE entries SET signature = '' WHERE seq = 100",
        "UPDATE entries SET body = '{}' WHERE seq = 20",
        "DELETE FROM genesis",
        "DROP TABLE standing",
        "DROP TABLE plans",
        "DROP TABLE secrets",
        "DROP INDEX one_entry_per_state",
        "CREATE TABLE more (x)",
        "CREATE TRIGGER forget AFTER INSERT ON entries BEGIN DELETE FROM plans; END",
    ],
)
def test_a_damaged_file_is_refused(life, statement):
    edit(life.path, statement)
    assert refused(life)


def test_a_file_without_its_triggers_is_refused(life):
    edit(life.path, keep_triggers=False)
    assert refused(life)


def test_flipped_bytes_of_the_file_never_change_what_it_says(original, tmp_path):
    """400 seeded bytes anywhere in the database. Each is refused, found, or lies where no history is kept."""
    content = original.path.read_bytes()
    truth = list(open_history(original.path).lines())
    rng = random.Random(2)
    path = tmp_path / "ledger.db"
    noticed = opens = 0
    for _ in range(400):
        position = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] = (flipped[position] + rng.randrange(1, 256)) % 256
        path.write_bytes(flipped)
        if found(path):
            noticed += 1
            opens += not refused(replace(original, path=path))
        else:
            history = open_history(path)
            assert list(history.lines()) == truth
            assert history.head == original.heads[100]
    assert noticed > 120
    assert opens == 0


# An older copy.


def test_a_deleted_tail_is_a_rollback_that_the_witness_and_receipts_show(life):
    edit(life.path, "DELETE FROM entries WHERE seq > 60")
    assert not found(life.path)  # true in itself: every entry carries its own signature
    assert found(life.path, witness=life.witness.read())
    assert found(life.path, receipts=[life.heads[61]])
    with pytest.raises(BadInputError, match="witness has seen entry 100"):
        life.open(machine=MACHINE)


def test_an_older_copy_of_the_file_is_refused_and_found(tmp_path):
    witness = Witness(tmp_path / "witness")
    ledger = new_ledger(tmp_path, witness=witness)
    spend(ledger, 2)
    ledger.close()
    shutil.copy(tmp_path / "ledger.db", tmp_path / "backup.db")
    ledger = open_ledger(tmp_path, witness=witness)
    spend(ledger, 1)
    receipt = ledger.head
    ledger.close()
    shutil.copy(tmp_path / "backup.db", tmp_path / "ledger.db")
    with pytest.raises(BadInputError, match="older copy"):
        open_ledger(tmp_path, witness=witness)
    assert found(tmp_path / "ledger.db", witness=witness.read())
    assert found(tmp_path / "ledger.db", receipts=[receipt])
    assert not found(tmp_path / "ledger.db")  # nothing inside the file can tell


def test_a_copy_put_back_while_the_ledger_is_open_signs_nothing(tmp_path):
    witness = Witness(tmp_path / "witness")
    ledger = new_ledger(tmp_path, witness=witness)
    spend(ledger, 2)
    edit(tmp_path / "ledger.db", "DELETE FROM entries WHERE seq > 2")
    with pytest.raises(LedgerMismatchError, match="older copy"):
        ledger.reserve(request(9), bytes(32))
    assert ledger_length(tmp_path / "ledger.db") == 2


@pytest.mark.parametrize("seq", [2, 3, 4])
def test_an_entry_altered_while_the_ledger_is_open_is_not_built_upon(tmp_path, seq):
    """The last one says what was spent. Another process may have appended it, so it is looked at before each change."""
    ledger, other = new_ledger(tmp_path), open_ledger(tmp_path)
    spend(ledger, 2)
    db = sqlite3.connect(tmp_path / "ledger.db")
    body = db.execute("SELECT body FROM entries WHERE seq = ?", (seq,)).fetchone()[0]
    db.close()
    cheaper = canonical_json(json.loads(body) | {"rdp_total": "0"}).decode()
    edit(tmp_path / "ledger.db", f"UPDATE entries SET body = '{cheaper}' WHERE seq = {seq}")
    for open_one in (ledger, other) if seq == 4 else (other,):
        with pytest.raises(LedgerMismatchError, match=f"entry {seq} was altered"):
            open_one.reserve(request(9), bytes(32))
    assert ledger_length(tmp_path / "ledger.db") == 4


def test_an_entry_that_another_process_did_not_sign_is_not_built_upon(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1)
    forger = Forger(ledger.genesis, STRANGER, ledger.entries())
    entry = forger.charge(request(2)).entries[-1]
    statement = f"INSERT INTO entries (seq, body, hash, signature) VALUES (3, '{entry.line.decode()}', '{entry.hash}', "
    edit(tmp_path / "ledger.db", f"{statement}'{forger.head.signature}')")
    with pytest.raises(LedgerMismatchError, match="entry 3 is not signed"):
        ledger.reserve(request(9), bytes(32))
    with pytest.raises(LedgerMismatchError, match="entry 3 is not signed"):
        ledger.rotate_key(STRANGER)
    assert ledger_length(tmp_path / "ledger.db") == 3


# The container: what SQLite itself would have to notice.


def moved_root(path, name: str, to: str) -> None:
    """Let an index begin at another one's root page."""
    db = sqlite3.connect(path)
    db.execute("PRAGMA writable_schema = ON")
    db.execute(
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = ?) WHERE name = ?",
        (to, name),
    )
    db.commit()
    db.close()


@pytest.mark.parametrize("to", ["sqlite_autoindex_secrets_1", "sqlite_autoindex_plans_1", "replies", "entries"])
def test_an_index_that_leads_elsewhere_is_refused(life, to):
    """A committed charge would not be found in it, and would run and be charged again."""
    moved_root(life.path, "one_entry_per_state", to)
    with pytest.raises(BadInputError, match="damaged"):
        life.open()


@pytest.mark.parametrize("kept", ["state != 'COMMITTED'", "seq < 100", "0"])
def test_an_index_without_some_entries_is_refused(life, kept):
    db = sqlite3.connect(life.path)
    (sql,) = db.execute("SELECT sql FROM sqlite_master WHERE name = 'one_entry_per_state'").fetchone()
    db.execute("DROP INDEX one_entry_per_state")
    db.execute(f"{sql} WHERE {kept}")
    db.commit()
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'one_entry_per_state'", (sql,))
    db.commit()
    db.close()
    with pytest.raises(BadInputError, match="damaged"):
        life.open()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS SELECT * FROM entries",
        "CREATE INDEX more ON entries (state)",
        "INSERT INTO genesis SELECT * FROM genesis",
        "ALTER TABLE secrets ADD COLUMN more",
    ],
)
def test_what_no_ledger_has_is_refused(life, statement):
    edit(life.path, statement)
    assert refused(life)


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("entries", "n AS seq, '{}' AS body, '' AS hash, '' AS signature FROM r"),
        ("genesis", "'' AS document, '' AS signature FROM r WHERE n < 0"),
    ],
)
def test_a_view_in_place_of_a_table_is_not_read(life, table, columns, version):
    """It never ends, for whoever opens the ledger as for whoever audits it."""
    edit(
        life.path,
        f"ALTER TABLE {table} RENAME TO more",
        f"CREATE VIEW {table} AS {ENDLESS} SELECT {columns}",
        f"PRAGMA user_version = {version}",
        keep_triggers=False,
    )
    db = sqlite3.connect(life.path)
    db.set_progress_handler(lambda: 1, 10**6)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        db.execute(f"SELECT * FROM {table}").fetchall()
    db.close()
    with pytest.raises(BadInputError, match="tables or triggers were altered"):
        life.open()
    with pytest.raises(BadInputError, match=r"tables or triggers were altered|format version 1"):
        open_history(life.path)


def test_a_pipe_is_no_history(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInputError, match="is no file, must be a ledger or its export"):
        open_history(tmp_path / "pipe")


def test_a_log_that_is_taken_away_or_put_back_is_an_older_copy(tmp_path):
    witness = Witness(tmp_path / "witness")
    ledger = new_ledger(tmp_path, witness=witness)
    spend(ledger, 1)
    log, path = tmp_path / "ledger.db-wal", tmp_path / "ledger.db"
    reservation = ledger.reserve(request(2), bytes(32))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    shutil.copy(path, crashed / "ledger.db")  # as a crash leaves it: the last entry is in the log alone
    older = log.read_bytes()
    ledger.commit(reservation, b"reply")
    with pytest.raises(BadInputError, match="older copy"):
        open_ledger(crashed, witness=witness)
    (crashed / "ledger.db-wal").write_bytes(older)
    with pytest.raises(BadInputError, match="older copy"):
        open_ledger(crashed, witness=witness)


def test_another_way_to_keep_the_journal_is_put_right(life):
    db = sqlite3.connect(life.path)
    assert db.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    db.close()
    ledger = life.open()
    db = sqlite3.connect(life.path)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    ledger.close()


# Genesis and keys.


@pytest.mark.parametrize("change", [{"epsilon": "80"}, {"rdp_budget": "9" * 15}, {"mode": "deployment"}, {"unit": "x"}])
@pytest.mark.parametrize("entries", [0, 1])
def test_another_genesis_is_found_and_refused(tmp_path, change, entries):
    ledger = new_ledger(tmp_path)
    spend(ledger, entries)
    other = replace(ledger.genesis, **change)
    ledger.close()
    for key in (KEY, STRANGER):
        own = replace(other, public_key=public_hex(key))
        head = SignedHead.sign(STRANGER, own.ledger_id, 0, own.hash)
        line = own.line.decode()
        edit(tmp_path / "ledger.db", f"UPDATE genesis SET document = '{line}', signature = '{head.signature}'")
        assert found(tmp_path / "ledger.db")
        with pytest.raises(BadInputError):
            open_ledger(tmp_path)
        with pytest.raises(BadInputError):
            Ledger(tmp_path / "ledger.db", STRANGER)


def test_a_rotation_invented_in_the_table_of_rotations_counts_for_nothing(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1)
    ledger.close()
    forged = KeyRotation.sign(ledger.genesis.ledger_id, STRANGER, STRANGER).model_dump()
    forged["old_key"] = public_hex(KEY)
    edit(tmp_path / "ledger.db", f"INSERT INTO standing VALUES ('rotations', '{json.dumps([forged])}')")
    with pytest.raises(BadInputError, match="another key"):
        Ledger(tmp_path / "ledger.db", STRANGER)
    ledger = open_ledger(tmp_path)
    assert ledger.rotations == []
    assert ledger.current_key == public_hex(KEY)


# What derives from the entries: put right on opening, whatever it says.


def tables(path) -> dict[str, list[tuple]]:
    db = sqlite3.connect(path)
    try:
        return {t: sorted(db.execute(f"SELECT * FROM {t}").fetchall()) for t in ("plans", "standing")}
    finally:
        db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM plans",
        "UPDATE plans SET open = 1",
        "UPDATE plans SET drawn = '0'",
        "UPDATE plans SET set_aside = '-99999999999999', open = 1",
        "UPDATE plans SET set_aside = 'x', open = 1",
        "INSERT INTO plans VALUES ('9', 'free', '99999999999999', '0', 1)",
        "DELETE FROM standing",
        "UPDATE standing SET value = 'mine' WHERE name = 'machine'",
        "UPDATE standing SET value = 'no JSON' WHERE name = 'rotations'",
        "UPDATE standing SET value = '[]' WHERE name = 'rotations'",
        "INSERT INTO standing VALUES ('more', 'of it')",
    ],
)
def test_plans_and_standing_are_what_the_entries_say(life, statement):
    before = tables(life.path)
    assert before["plans"]
    assert len(before["standing"]) == 2
    edit(life.path, statement)
    assert tables(life.path) != before
    life.open().close()
    assert tables(life.path) == before


def test_the_machine_cannot_be_changed_in_the_file(life):
    edit(life.path, "UPDATE standing SET value = 'mine' WHERE name = 'machine'")
    with pytest.raises(BadInputError, match="another machine"):
        life.open(machine="mine")


def test_opening_an_untouched_ledger_writes_nothing(life):
    before = life.path.read_bytes()
    life.open().close()
    assert life.path.read_bytes() == before


def test_a_closed_plan_stays_closed(tmp_path):
    ledger = new_ledger(tmp_path)
    ledger.admit(CHEAP, 2)
    ledger.close_plans("7")
    ledger.close()
    for statement in ("DELETE FROM plans", "UPDATE plans SET open = 1"):
        edit(tmp_path / "ledger.db", statement)
        ledger = open_ledger(tmp_path)
        with pytest.raises(PlanClosedError):
            ledger.admit(CHEAP, 2)
        ledger.close()


def test_plans_edited_while_the_ledger_is_open_cannot_raise_the_budget(tmp_path):
    """Spent is what the last signed entry says; the tables can at most take from what is free, or from another plan."""
    ledger = new_ledger(tmp_path, epsilon=3.0)
    price = charge_units(request().mechanism, float(ledger.genesis.order))
    fits = int(ledger.genesis.rdp_budget) // price
    ledger.admit(request(), fits)
    edit(tmp_path / "ledger.db", "UPDATE plans SET set_aside = '-999999999999999', drawn = '0'")
    spend(ledger, fits, plan_hash="other")
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(request(9999), bytes(32))
    assert ledger.epsilon_spent <= 3.0


# Replies, secrets and local state.


def test_a_reply_that_was_changed_is_not_sent(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1, body=b"first")
    assert isinstance(ledger.reserve(request(), bytes(32)), StoredReply)
    edit(tmp_path / "ledger.db", "UPDATE replies SET body = CAST('other' AS BLOB)")
    with pytest.raises(ReplyExpiredError):
        ledger.reserve(request(), bytes(32))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET signature = '' WHERE seq = 2",
        "UPDATE entries SET signature = (SELECT signature FROM entries WHERE seq = 1) WHERE seq = 2",
        "UPDATE replies SET seq = 7 - seq WHERE seq = 2",
    ],
)
def test_a_reply_whose_receipt_does_not_hold_is_not_sent(tmp_path, statement):
    ledger = new_ledger(tmp_path)
    spend(ledger, 2)
    edit(tmp_path / "ledger.db", statement)
    with pytest.raises(ReplyExpiredError):
        ledger.reserve(request(), bytes(32))
    assert isinstance(ledger.reserve(request(2), bytes(32)), StoredReply)


def test_replies_exchanged_between_charges_are_not_sent(tmp_path):
    ledger = new_ledger(tmp_path)
    for number, body in ((1, b"first"), (2, b"second")):
        reservation = ledger.reserve(request(number), bytes(32))
        ledger.commit(reservation, body)
    edit(
        tmp_path / "ledger.db",
        "CREATE TABLE more AS SELECT charge_id, seq FROM replies",
        "UPDATE replies SET charge_id = 'none' WHERE seq = 2",
        "UPDATE replies SET charge_id = (SELECT charge_id FROM more WHERE seq = 2) WHERE seq = 4",
        "UPDATE replies SET charge_id = (SELECT charge_id FROM more WHERE seq = 4) WHERE seq = 2",
        "DROP TABLE more",
    )
    for number in (1, 2):
        with pytest.raises(ReplyExpiredError):
            ledger.reserve(request(number), bytes(32))


@pytest.mark.parametrize("secret", ["zeroblob(32)", "zeroblob(0)", "'text'", "7"])
def test_a_secret_that_was_damaged_is_not_drawn_from(tmp_path, secret):
    """With it, the work that a crash interrupted would be a second mechanism, and only one was charged."""
    ledger = new_ledger(tmp_path)
    ledger.reserve(CHEAP, b"1" * 32)
    edit(tmp_path / "ledger.db", f"UPDATE secrets SET secret = {secret}")
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(CHEAP, b"2" * 32)


def test_secrets_change_neither_what_is_spent_nor_what_was_committed(tmp_path):
    ledger = new_ledger(tmp_path)
    reservation = ledger.reserve(CHEAP, b"1" * 32)
    spent = ledger.epsilon_spent
    edit(tmp_path / "ledger.db", "UPDATE secrets SET attempts = -100")  # more attempts, with the very same noise
    for _ in range(5):
        again = ledger.reserve(CHEAP, b"2" * 32)
        assert isinstance(again, Reservation)
        assert (again.secret, ledger.epsilon_spent) == (b"1" * 32, spent)
    edit(tmp_path / "ledger.db", "UPDATE secrets SET repeat_key = 'other'")
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(CHEAP, bytes(32))
    with pytest.raises(ValueError, match="no reservation"):
        ledger.commit(reservation, b"too late")
    other = request(2, sigma=20.0)
    reservation = ledger.reserve(other, b"3" * 32)
    edit(tmp_path / "ledger.db", "DELETE FROM secrets")
    with pytest.raises(ChargeAbandonedError):  # never run again with fresh noise
        ledger.reserve(other, b"4" * 32)
    assert audit_history(open_history(tmp_path / "ledger.db")).findings == []


def test_a_secret_for_a_committed_or_abandoned_charge_revives_nothing(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger, 1, body=b"paid")
    charge_id = request().charge_id(ledger.genesis.ledger_id)
    edit(tmp_path / "ledger.db", f"INSERT INTO secrets VALUES ('{charge_id}', zeroblob(32), 0, '')")
    again = ledger.reserve(request(), bytes(32))
    assert isinstance(again, StoredReply)
    assert again.body == b"paid"


def test_genesis_lines_read_back(original):
    first = open_history(original.path).genesis
    assert Genesis.parse(first.line) == first
    assert asdict(first) == json.loads(first.line) | {"held_out": "0", "side": "training"}
    assert first.hash != genesis().hash or first == genesis()
