"""The owner's ledger: what was spent, written before it is spent, and the reply it paid for.

One SQLite file per node and dataset, readable by its owner only. A charge is RESERVED, durably, before
private data is touched; the reply is stored in the same transaction that marks the charge COMMITTED. So a
crash at any moment can lose work but never a charge, and a redelivered request gets the stored bytes.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from model.errors import BadInputError
from privacy.accounting import charge_units, epsilon_of
from privacy.canonical import canonical_json, sha256
from privacy.ledger_entry import (
    ENTRY_FIELDS,
    FORMAT_VERSION,
    INFINITE,
    ChargeRequest,
    Entry,
    Genesis,
    State,
    add_units,
)

_MOST_ATTEMPTS = 2
_SCHEMA = f"""
CREATE TABLE genesis (document TEXT NOT NULL);
CREATE TABLE entries ({", ".join(_column for _column in ENTRY_FIELDS)},
    PRIMARY KEY (seq), UNIQUE (charge_id, state)) WITHOUT ROWID;
CREATE TABLE secrets (charge_id TEXT PRIMARY KEY, secret BLOB NOT NULL, attempts INTEGER NOT NULL);
CREATE TABLE replies (charge_id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries never change'); END;
CREATE TRIGGER entries_never_go BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'ledger entries are never deleted'); END;
PRAGMA user_version = {FORMAT_VERSION};
"""
_INSERT = f"INSERT INTO entries VALUES ({', '.join(':' + _column for _column in ENTRY_FIELDS)})"  # noqa: S608  (our own names)


class BudgetExhaustedError(Exception):
    """The charge would exceed the budget; nothing was written."""


class ChargeAbandonedError(Exception):
    """The charge was given up after repeated failures; it stays spent and is not run again."""


class ReplyExpiredError(Exception):
    """The charge was committed but its stored reply has been pruned."""


@dataclass(frozen=True)
class Reservation:
    """A paid charge whose output does not exist yet. ``secret`` seeds everything random in it."""

    charge_id: str
    request: ChargeRequest
    secret: bytes


@dataclass(frozen=True)
class StoredReply:
    """The output of a charge that was committed before."""

    charge_id: str
    body: bytes


class Ledger:
    """An open ledger file. Safe for several processes: reserving is one immediate transaction."""

    def __init__(self, path: Path) -> None:
        """Open an existing ledger.

        Raises:
            BadInputError: no such file, not a ledger, or a format version that this Conclave cannot read.
        """
        if not path.is_file():
            raise BadInputError(f"{path}: no such file, must be a ledger")
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None, timeout=60.0, check_same_thread=False)
        try:
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == FORMAT_VERSION:
                self.genesis = _read_genesis(self._db)
                # A simulation protects nobody: its ledger must survive a killed process, not a power cut.
                synchronous = "OFF" if self.genesis.mode == "simulation" else "FULL"
                self._db.execute(f"PRAGMA synchronous = {synchronous}")
                self._db.execute("PRAGMA secure_delete = ON")  # an erased secret is overwritten, not unlinked
                return
        except (sqlite3.DatabaseError, TypeError, ValueError) as error:
            self._db.close()
            raise BadInputError(f"{path}: not a ledger") from error
        self._db.close()
        raise BadInputError(f"{path}: ledger format version {version}, must be {FORMAT_VERSION}")

    @classmethod
    def create(cls, path: Path, genesis: Genesis) -> Ledger:
        """Create a ledger file, readable by its owner only.

        Raises:
            BadInputError: the file exists.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft-{os.getpid()}")  # a crash leaves no half-made ledger behind
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            db = sqlite3.connect(draft, isolation_level=None)
            db.execute("PRAGMA synchronous = FULL")
            db.executescript("BEGIN IMMEDIATE;" + _SCHEMA)
            db.execute("INSERT INTO genesis VALUES (?)", (canonical_json(asdict(genesis)).decode(),))
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL").fetchone()
            db.close()
            os.link(draft, path)  # fails where a ledger exists; a rename would replace it
        except FileExistsError as error:
            raise BadInputError(f"{path}: exists already, must be a new file") from error
        finally:
            draft.unlink(missing_ok=True)
        return cls(path)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def reserve(self, request: ChargeRequest, fresh_secret: bytes) -> Reservation | StoredReply:
        """Charge the budget, durably, before anything is computed from private data.

        Returns a reservation, or the stored reply if this very charge was committed before. A charge that was
        reserved but never committed (a crash) is returned with its first secret: running it again is then the
        same mechanism, not a second one. It is tried at most twice.

        Raises:
            BudgetExhaustedError: the budget does not allow it.
            ChargeAbandonedError, ReplyExpiredError: see there.
            BadInputError: a charge without privacy, or seeded randomness, outside a simulation ledger.
        """
        if self.genesis.mode != "simulation" and (request.mechanism is None or request.rng == "seeded"):
            raise BadInputError("training without privacy or with seeded noise is allowed in simulation only")
        charge_id = request.charge_id(self.genesis.ledger_id)
        with self._transaction():
            states = self._states(charge_id)
            if "COMMITTED" in states:
                return StoredReply(charge_id, self._reply(charge_id))
            if "ABANDONED" in states:
                raise ChargeAbandonedError
            if "RESERVED" not in states:
                self._append(charge_id, request, "RESERVED", self._price(request), output_hash="")
                self._db.execute("INSERT INTO secrets VALUES (?, ?, 1)", (charge_id, fresh_secret))
                return Reservation(charge_id, request, fresh_secret)
            secret, attempts = self._db.execute(
                "SELECT secret, attempts FROM secrets WHERE charge_id = ?", (charge_id,)
            ).fetchone()
            if attempts < _MOST_ATTEMPTS:
                self._db.execute("UPDATE secrets SET attempts = attempts + 1 WHERE charge_id = ?", (charge_id,))
                return Reservation(charge_id, request, secret)
            self._append(charge_id, request, "ABANDONED", "0", output_hash="")
            self._db.execute("DELETE FROM secrets WHERE charge_id = ?", (charge_id,))
        raise ChargeAbandonedError

    def commit(self, reservation: Reservation, body: bytes) -> bytes:
        """Store the output that a reservation paid for and return the bytes to send.

        If another worker committed the same charge first, its bytes are returned and ``body`` is discarded.

        Raises:
            ValueError: there is no reservation for this charge.
        """
        charge_id = reservation.charge_id
        with self._transaction():
            states = self._states(charge_id)
            if "COMMITTED" in states:
                return self._reply(charge_id)
            if "RESERVED" not in states or "ABANDONED" in states:
                raise ValueError("no reservation pays for this output")
            self._append(charge_id, reservation.request, "COMMITTED", "0", output_hash=sha256(body))
            self._db.execute("INSERT INTO replies VALUES (?, ?)", (charge_id, body))
            self._db.execute("DELETE FROM secrets WHERE charge_id = ?", (charge_id,))
        # The secret's bytes survive in the write-ahead log until it is folded back and cut off.
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return body

    def entries(self) -> list[Entry]:
        """Return all entries in order."""
        rows = self._db.execute("SELECT * FROM entries ORDER BY seq")
        return [Entry(**dict(zip(ENTRY_FIELDS, row, strict=True))) for row in rows]

    @property
    def epsilon_spent(self) -> float:
        """ε of everything charged so far at the ledger's δ; ``inf`` after a charge without privacy."""
        total = self._head()[1]
        if total == INFINITE:
            return float("inf")
        return epsilon_of(int(total), float(self.genesis.order), float(self.genesis.delta))

    def _price(self, request: ChargeRequest) -> str:
        if request.mechanism is None:
            return INFINITE
        price = charge_units(request.mechanism, float(self.genesis.order))
        total = add_units(self._head()[1], str(price))
        if total == INFINITE or int(total) > int(self.genesis.rdp_budget):
            raise BudgetExhaustedError
        return str(price)

    def _append(self, charge_id: str, request: ChargeRequest, state: State, charge: str, *, output_hash: str) -> None:
        seq, total, prev_hash = self._head()
        entry = Entry(
            version=FORMAT_VERSION,
            ledger_id=self.genesis.ledger_id,
            seq=seq + 1,
            prev_hash=prev_hash,
            charge_id=charge_id,
            state=state,
            mechanism=request.mechanism_json(),
            rdp_charge=charge,
            rdp_total=add_units(total, charge),
            rdp_budget=self.genesis.rdp_budget,
            run_id=request.run_id,
            round=request.round,
            plan_hash=request.plan_hash,
            code_hash=request.code_hash,
            model_in_hash=request.model_in_hash,
            output_hash=output_hash,
            releases=canonical_json(list(request.releases)).decode(),
            rng=request.rng,
            time=utc_now(),
        )
        entry = replace(entry, entry_hash=entry.computed_hash())
        self._db.execute(_INSERT, asdict(entry))

    def _head(self) -> tuple[int, str, str]:
        row = self._db.execute("SELECT seq, rdp_total, entry_hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return (0, "0", self.genesis.hash) if row is None else row

    def _states(self, charge_id: str) -> set[str]:
        return {s for (s,) in self._db.execute("SELECT state FROM entries WHERE charge_id = ?", (charge_id,))}

    def _reply(self, charge_id: str) -> bytes:
        row = self._db.execute("SELECT body FROM replies WHERE charge_id = ?", (charge_id,)).fetchone()
        if row is None:
            raise ReplyExpiredError
        return bytes(row[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _read_genesis(db: sqlite3.Connection) -> Genesis:
    (document,) = db.execute("SELECT document FROM genesis").fetchone()
    return Genesis(**json.loads(document))


def utc_now() -> str:
    """Return the current time as an ISO 8601 string in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
