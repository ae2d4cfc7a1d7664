"""The ledger's file format: tables, and the conversion of older formats to this one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from functools import cache

from conclave.base.canonical import canonical_json, sha256
from conclave.privacy.ledger.entry import ENTRY_FIELDS
from conclave.privacy.ledger.genesis import FORMAT_VERSION

TABLES = f"""
CREATE TABLE genesis (document TEXT NOT NULL, signature TEXT NOT NULL);
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL,
    charge_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.charge_id')) VIRTUAL,
    state TEXT GENERATED ALWAYS AS (json_extract(body, '$.state')) VIRTUAL);
CREATE UNIQUE INDEX one_entry_per_state ON entries (charge_id, state);
CREATE TABLE secrets (
    charge_id TEXT PRIMARY KEY, secret BLOB NOT NULL, attempts INTEGER NOT NULL, repeat_key TEXT NOT NULL);
CREATE TABLE replies (seq INTEGER PRIMARY KEY, charge_id TEXT NOT NULL UNIQUE, body BLOB NOT NULL);
CREATE TABLE plans (
    run_id TEXT NOT NULL, plan_hash TEXT NOT NULL, set_aside TEXT NOT NULL, drawn TEXT NOT NULL, open INTEGER NOT NULL,
    PRIMARY KEY (run_id, plan_hash));
CREATE TABLE local_state (name TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE standing (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries never change'); END;
CREATE TRIGGER entries_never_go BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries are never deleted'); END;
PRAGMA user_version = {FORMAT_VERSION};
"""


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Run several statements inside the transaction that is open (``executescript`` would end it)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def is_ours(db: sqlite3.Connection) -> bool:
    """Whether the file has exactly this format's tables, indices and triggers: another trigger could undo a charge."""
    return _schema(db) == _expected_schema()


def has_plain_tables(db: sqlite3.Connection) -> bool:
    """Whether everything readable from a file is stored in it: a view, or a virtual table, may never end."""
    return (
        db.execute(
            "SELECT 1 FROM sqlite_master WHERE type NOT IN ('table', 'index', 'trigger') OR sql LIKE 'CREATE VIRTUAL%'"
        ).fetchone()
        is None
    )


@cache
def _expected_schema() -> frozenset[tuple[str, ...]]:
    db = sqlite3.connect(":memory:")
    try:
        db.executescript(TABLES)
        return _schema(db)
    finally:
        db.close()


def _schema(db: sqlite3.Connection) -> frozenset[tuple[str, ...]]:
    return frozenset(db.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master"))


def bound_to(secret: object, repeat_key: str) -> str:
    """Return what the column ``repeat_key`` holds: a secret that was damaged since would draw different noise."""
    return sha256(repeat_key.encode() + secret) if isinstance(secret, bytes) else ""


def format_version(db: sqlite3.Connection) -> int:
    """Return the format version of a file, 0 where it states none."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


def migrate(db: sqlite3.Connection, sign: Callable[[int, str], str]) -> None:
    """Bring an older file to this format, inside the transaction that is open.

    Entries keep their bytes, so every hash and receipt stays what it was. The caller vouches for the result with a
    MIGRATED entry. ``sign`` returns the signature of a head: of a position and a hash.
    """
    version = format_version(db)
    while version in _STEPS:
        _STEPS[version](db, sign)
        version = format_version(db)


def _from_1(db: sqlite3.Connection, sign: Callable[[int, str], str]) -> None:
    """Version 1 kept a column per field, signed nothing and set no budget aside."""
    entries = db.execute("SELECT * FROM entries ORDER BY seq").fetchall()
    secrets = db.execute("SELECT charge_id, secret, attempts FROM secrets").fetchall()
    replies = db.execute("SELECT charge_id, body FROM replies").fetchall()
    (genesis,) = db.execute("SELECT document FROM genesis").fetchone()
    for table in ("entries", "secrets", "replies", "genesis"):  # the triggers go with their table
        db.execute(f"DROP TABLE {table}")
    run_script(db, TABLES)
    db.execute("INSERT INTO genesis VALUES (?, '')", (canonical_json(json.loads(genesis)).decode(),))
    seqs = {}
    for row in entries:
        document = dict(zip(ENTRY_FIELDS, row, strict=False))  # its last two columns were hash and signature
        body = canonical_json(document)
        head_hash = sha256(body)
        db.execute(
            "INSERT INTO entries (seq, body, hash, signature) VALUES (?, ?, ?, ?)",
            (document["seq"], body.decode(), head_hash, sign(document["seq"], head_hash)),
        )
        seqs[document["charge_id"]] = document["seq"]
    db.executemany("INSERT INTO secrets VALUES (?, ?, ?, ?)", [(*row, bound_to(row[1], "")) for row in secrets])
    db.executemany("INSERT INTO replies VALUES (?, ?, ?)", [(seqs[name], name, body) for name, body in replies])


_STEPS: dict[int, Callable[[sqlite3.Connection, Callable[[int, str], str]], None]] = {1: _from_1}
