"""The ledger's file as SQLite: opened, changed in whole transactions, read, and checked for alterations."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError
from conclave.privacy.ledger.derived import Derived
from conclave.privacy.ledger.genesis import Genesis, ledger_id_of
from conclave.privacy.ledger.heads import KeyRotation, SignedHead, current_key
from conclave.privacy.ledger.schema import is_ours

UNREADABLE = (sqlite3.Error, TypeError, ValueError, KeyError, AttributeError, OverflowError, MemoryError)
"""What reading a damaged file raises."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the file; transactions are begun by hand."""
    return sqlite3.connect(path, isolation_level=None, timeout=60.0, check_same_thread=False)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One immediate transaction: the only writer, all or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def read_genesis(db: sqlite3.Connection) -> Genesis:
    """Return the genesis of an open file."""
    (document,) = db.execute("SELECT document FROM genesis").fetchone()
    return Genesis.parse(document)


def read_head(db: sqlite3.Connection, genesis: Genesis) -> SignedHead:
    """Return the last head of an open file."""
    row = db.execute("SELECT seq, hash, signature FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        (signature,) = db.execute("SELECT signature FROM genesis").fetchone()
        row = (0, genesis.hash, signature)
    seq, head_hash, signature = row
    return SignedHead(ledger_id=genesis.ledger_id, seq=seq, hash=head_hash, signature=signature)


def read_rotations(db: sqlite3.Connection) -> list[KeyRotation]:
    """Return the changes of the signing key of an open file, oldest first."""
    row = db.execute("SELECT value FROM standing WHERE name = 'rotations'").fetchone()
    return [] if row is None else [KeyRotation.model_validate(item) for item in json.loads(row[0])]


def check_whole(db: sqlite3.Connection, path: Path) -> str:
    """Check an open file against the signature at its head; return the public key that signed it.

    Every entry is bound by the chain, so none can be altered, and what derives from entries is put right. A few
    microseconds an entry: states and prices are the audit's questions.

    Raises:
        BadInputError: something was altered.
    """
    last, last_hash, derived = check_chain(db, path)
    genesis = read_genesis(db)
    key = current_key(genesis.ledger_id, genesis.public_key, derived.rotations)
    head = read_head(db, genesis)
    named = genesis.ledger_id == ledger_id_of(genesis.public_key)
    if key is None or not named or (head.seq, head.hash) != (last, last_hash) or not head.signed_by(key):
        raise BadInputError(f"{path}: its last head does not hold, must be signed with its key")
    derived.store(db)
    return key


def check_chain(db: sqlite3.Connection, path: Path) -> tuple[int, str, Derived]:
    """Check an open file but for its signatures; return number and hash of its last entry, and what derives from all.

    SQLite looks at the file first: an index that leads elsewhere would hide entries that are there.

    Raises:
        BadInputError: the file is damaged, or something was altered.
    """
    check_tables(db, path)
    (damage,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if damage != "ok":
        raise BadInputError(f"{path}: the database is damaged ({damage.splitlines()[-1]}), must be restored")
    if db.execute("SELECT count(*) FROM genesis").fetchone() != (1,):
        raise BadInputError(f"{path}: must have one genesis")
    derived = Derived()
    last, last_hash = 0, read_genesis(db).hash
    for seq, body, entry_hash in db.execute("SELECT seq, body, hash FROM entries ORDER BY seq"):
        last += 1
        if seq != last or not follows(body, entry_hash, last_hash):
            raise BadInputError(f"{path}: entry {last} was altered, must be as it was signed")
        derived.take(body)
        last_hash = entry_hash
    if db.execute("SELECT count(*) FROM entries INDEXED BY one_entry_per_state").fetchone() != (last,):
        raise BadInputError(f"{path}: the database is damaged (an index lacks entries), must be restored")
    return last, last_hash, derived


def check_tables(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that has other tables, indices or triggers than a ledger.

    Raises:
        BadInputError: it has.
    """
    if not is_ours(db):
        raise altered(path)


def altered(path: Path) -> BadInputError:
    """Say that a file was changed in a way that no ledger does."""
    return BadInputError(f"{path}: its tables or triggers were altered, must be those of a ledger")


def follows(body: str, entry_hash: str, last_hash: str) -> bool:
    """Whether an entry is what its hash says, and comes after the one of ``last_hash``."""
    # A string inside the entry cannot spell this: its quotes would be escaped.
    return f'"prev_hash":"{last_hash}"' in body and sha256(body.encode()) == entry_hash
