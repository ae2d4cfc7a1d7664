"""The ledger file: a signed hash chain in SQLite, one transaction per change, mirrored to the witness.

What every change has in common. What may be charged, and when, is in :mod:`conclave.privacy.ledger.ledger`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.base.canonical import canonical_json, sha256
from conclave.base.errors import BadInputError
from conclave.privacy.ledger.database import (
    UNREADABLE,
    altered,
    check_chain,
    check_tables,
    check_whole,
    connect,
    follows,
    read_genesis,
    read_head,
    read_rotations,
    transaction,
)
from conclave.privacy.ledger.entry import Entry, State, add_units
from conclave.privacy.ledger.errors import LedgerMismatchError
from conclave.privacy.ledger.genesis import FORMAT_VERSION, Genesis, ledger_id_of, utc_now
from conclave.privacy.ledger.heads import KeyRotation, SignedHead, public_hex
from conclave.privacy.ledger.mechanism_text import spell_migration, spell_rotation
from conclave.privacy.ledger.schema import TABLES, format_version, has_plain_tables, migrate, run_script
from conclave.privacy.ledger.witness import Witness


class Store:
    """An open ledger file. Safe for several processes: every change is one immediate transaction."""

    def __init__(
        self, path: Path, key: Ed25519PrivateKey, *, witness: Witness | None = None, machine: str | None = None
    ) -> None:
        """Open an existing ledger, bringing an older format to this one.

        Args:
            key: the ledger's current signing key.
            witness: where heads are mirrored. A ledger outside simulation does not open without one.
            machine: this machine's id; compared where given. Required outside simulation.

        Raises:
            BadInputError: no such file, not a ledger, altered, a format this Conclave cannot read, another key or
                machine, or a witness that is missing, ahead or of another history.
        """
        if not path.is_file():
            raise BadInputError(f"{path}: no such file, must be a ledger")
        self.path = path
        self._key = key
        self._witness = witness
        self._one_thread = threading.RLock()  # a connection has one transaction at a time
        self._appended: SignedHead | None = None  # in the open transaction
        self._db = connect(path)
        try:
            self._open(machine)
        except BaseException as error:
            self._db.close()
            if isinstance(error, UNREADABLE) and not isinstance(error, BadInputError):
                raise BadInputError(f"{path}: not a ledger") from error
            raise

    def _open(self, machine: str | None) -> None:
        version = format_version(self._db)
        if not 1 <= version <= FORMAT_VERSION:
            raise BadInputError(f"{self.path}: ledger format version {version}, must be 1 to {FORMAT_VERSION}")
        self._db.execute("PRAGMA secure_delete = ON")  # an erased secret is overwritten, not unlinked
        if version < FORMAT_VERSION:
            self._migrate(machine)
        check_tables(self._db, self.path)  # before anything is read from what is called so
        self.genesis = read_genesis(self._db)
        # A simulation protects nobody: its ledger must survive a killed process, not a power cut.
        synchronous = "OFF" if self.genesis.mode == "simulation" else "FULL"
        self._db.execute(f"PRAGMA synchronous = {synchronous}")
        with transaction(self._db):
            self._check_key(check_whole(self._db, self.path))
            self._check_place(machine)
            self._verified = read_head(self._db, self.genesis)
        self._db.execute("PRAGMA journal_mode = WAL").fetchone()  # somebody may have changed it
        self._catch_up()
        self._erase_log()  # a process that was killed after erasing a secret did not come to it

    @classmethod
    def create(
        cls,
        path: Path,
        genesis: Genesis,
        key: Ed25519PrivateKey,
        *,
        witness: Witness | None = None,
    ) -> Self:
        """Create a ledger file, readable by its owner only.

        Raises:
            BadInputError: the file, or a witness of another ledger, exists; the key is not the genesis'.
        """
        if genesis.public_key != public_hex(key) or genesis.ledger_id != ledger_id_of(genesis.public_key):
            raise BadInputError(f"{path}: the genesis names another key, must name the one it is signed with")
        if path.exists():  # before the witness is touched, which may be that ledger's
            raise BadInputError(f"{path}: exists already, must be a new file")
        seen = None if witness is None else witness.read()
        # An attempt that was interrupted may have left one, of the same key and before any entry.
        if witness is not None and seen is not None and (seen.ledger_id, seen.seq) != (genesis.ledger_id, 0):
            raise BadInputError(f"{witness.path}: is the witness of a ledger already, must be a new file")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft-{os.getpid()}")  # a crash leaves no half-made ledger behind
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        head = SignedHead.sign(key, genesis.ledger_id, 0, genesis.hash)
        try:
            db = connect(draft)
            db.execute("PRAGMA synchronous = FULL")
            with transaction(db):
                run_script(db, TABLES)
                db.execute("INSERT INTO genesis VALUES (?, ?)", (genesis.line.decode(), head.signature))
            db.execute("PRAGMA journal_mode = WAL").fetchone()
            db.close()
            if witness is not None:
                witness.mirror(lambda: head)
            os.link(draft, path)  # fails where a ledger exists; a rename would replace it
        except FileExistsError as error:
            raise BadInputError(f"{path}: exists already, must be a new file") from error
        finally:
            draft.unlink(missing_ok=True)
        return cls(path, key, witness=witness, machine=genesis.machine_id)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def head(self) -> SignedHead:
        """The last entry's position and hash, signed."""
        with self._one_thread:
            return read_head(self._db, self.genesis)

    @property
    def rotations(self) -> list[KeyRotation]:
        """The changes of the signing key, oldest first."""
        with self._one_thread:
            return read_rotations(self._db)

    @property
    def current_key(self) -> str:
        """The public key that heads are signed with now, hexadecimal."""
        rotations = self.rotations
        return rotations[-1].new_key if rotations else self.genesis.public_key

    def entries(self) -> list[Entry]:
        """Return all entries in order."""
        return [Entry.parse(body) for (body,) in self._rows("SELECT body FROM entries ORDER BY seq")]

    def rotate_key(self, new_key: Ed25519PrivateKey) -> KeyRotation:
        """Sign with another key from now on. The change is an entry that both keys signed.

        Raises:
            BadInputError: the ledger was signed with that key before.
        """
        old_key = self._key
        rotation = KeyRotation.sign(self.genesis.ledger_id, old_key, new_key)
        try:
            with self._change():
                if rotation.new_key in {self.genesis.public_key, *(item.new_key for item in self.rotations)}:
                    raise BadInputError(f"{self.path}: has been signed with this key before, must get a new one")
                self._key = new_key
                self._append("ROTATED", sha256(rotation.new_key.encode()), spell_rotation(rotation))
                rotations = [item.model_dump() for item in [*self.rotations, rotation]]
                self._stand("rotations", canonical_json(rotations).decode())
        except BaseException:
            if self.current_key != rotation.new_key:  # it is in force where only the witness could not follow
                self._key = old_key
            raise
        return rotation

    def holds(self, head: SignedHead) -> bool:
        """Whether a head lies on this ledger's chain."""
        if head.ledger_id != self.genesis.ledger_id:
            return False
        if head.seq == 0:
            return head.hash == self.genesis.hash
        return self._rows("SELECT hash FROM entries WHERE seq = ?", head.seq) == [(head.hash,)]

    def check_witness(self) -> None:
        """Compare with the witness, if there is one.

        Raises:
            LedgerMismatchError: it is missing, ahead, or belongs to another history.
        """
        if self._witness is None:
            return
        seen = self._witness.read()
        if seen is None:
            raise LedgerMismatchError(f"its witness {self._witness.path} is missing, so entries may have been lost")
        if seen.seq > self.head.seq:
            raise LedgerMismatchError(
                f"ends at entry {self.head.seq}, but its witness has seen entry {seen.seq}: this is an older copy"
            )
        if not self.holds(seen):
            raise LedgerMismatchError("its witness has seen another history, so this is not the ledger it mirrors")

    def _check_key(self, signed_with: str) -> None:
        if signed_with != public_hex(self._key):
            raise BadInputError(f"{self.path}: was signed with another key, must be opened with its own")

    def _check_place(self, machine: str | None) -> None:
        """Refuse a copy: a ledger of another machine, or one that its witness knows to be incomplete."""
        rows = self._rows("SELECT value FROM standing WHERE name = 'machine'")
        expected = rows[0][0] if rows else self.genesis.machine_id
        deployed = self.genesis.mode == "deployment"
        if (deployed or machine is not None) and machine != expected:
            raise BadInputError(f"{self.path}: belongs to another machine, must be restored here before it is used")
        if deployed and self._witness is None:
            raise BadInputError(f"{self.path}: has no witness, must have one outside the database")
        try:
            self.check_witness()
        except LedgerMismatchError as error:
            raise BadInputError(f"{self.path}: {error}") from error

    def _catch_up(self) -> None:
        """Update a witness that agrees but, because of a crash, did not hear of the last entry."""
        self._mirror()

    def _migrate(self, machine: str | None) -> None:
        with transaction(self._db):
            found = format_version(self._db)
            if found == FORMAT_VERSION:
                return  # another process was faster
            if not has_plain_tables(self._db):
                raise altered(self.path)
            self.genesis = read_genesis(self._db)
            Store._check_key(self, self.genesis.public_key)
            self._check_unsigned(found, machine)  # before anything is signed
            migrate(self._db, lambda seq, head_hash: self._sign(seq, head_hash).signature)
            head = self._sign(0, self.genesis.hash)
            self._db.execute("UPDATE genesis SET signature = ?", (head.signature,))
            said = spell_migration(found, FORMAT_VERSION)
            self._append("MIGRATED", sha256(f"to {FORMAT_VERSION}".encode()), said)
            check_whole(self._db, self.path)

    def _check_unsigned(self, version: int, machine: str | None) -> None:
        """Look at what an older format would become, and undo that: it is not signed, so anybody can write one.

        Its witness must have seen its last entry. A simulation has none, and nobody to protect.
        """
        self._db.execute("SAVEPOINT unsigned")
        migrate(self._db, lambda seq, head_hash: "")
        last, last_hash, _ = check_chain(self._db, self.path)
        self._db.execute("ROLLBACK TO unsigned")
        self._db.execute("RELEASE unsigned")
        if self.genesis.version > version:
            raise BadInputError(f"{self.path}: begun in a later format than the file's, so it was replaced")
        if self.genesis.mode == "simulation" and self._witness is None:
            return
        if machine is not None and machine != self.genesis.machine_id:
            raise BadInputError(f"{self.path}: belongs to another machine, must be converted where it was used")
        seen = None if self._witness is None else self._witness.read()
        of = (self.genesis.ledger_id, last, last_hash)
        if seen is None or (seen.ledger_id, seen.seq, seen.hash) != of or not seen.signed_by(self.genesis.public_key):
            raise BadInputError(
                f"{self.path}: of format version {version}, which is not signed, and its witness has not seen its last "
                "entry; must be restored from a backup of this format"
            )

    def _sign(self, seq: int, head_hash: str) -> SignedHead:
        return SignedHead.sign(self._key, self.genesis.ledger_id, seq, head_hash)

    def _append(
        self,
        state: State,
        charge_id: str,
        mechanism: str,
        charge: str = "0",
        *,
        run_id: str = "",
        round_number: int = 0,
        plan_hash: str = "",
        code_hash: str = "",
        model_in_hash: str = "",
        output_hash: str = "",
        releases: str = "[]",
        rng: str = "",
        time: str | None = None,
    ) -> SignedHead:
        """Append an entry inside the open transaction; return the new head, signed."""
        seq, total, prev_hash = self._last()
        entry = Entry(
            version=FORMAT_VERSION,
            ledger_id=self.genesis.ledger_id,
            seq=seq + 1,
            prev_hash=prev_hash,
            charge_id=charge_id,
            state=state,
            mechanism_text=mechanism,
            rdp_charge=charge,
            rdp_total=add_units(total, charge),
            rdp_budget=self.genesis.rdp_budget,
            run_id=run_id,
            round=round_number,
            plan_hash=plan_hash,
            code_hash=code_hash,
            model_in_hash=model_in_hash,
            output_hash=output_hash,
            releases=releases,
            rng=rng,
            time=self._time_of(state, charge_id, run_id, plan_hash) if time is None else self._not_before_last(time),
        )
        line = entry.line
        head = self._sign(entry.seq, sha256(line))
        self._db.execute(
            "INSERT INTO entries (seq, body, hash, signature) VALUES (?, ?, ?, ?)",
            (entry.seq, line.decode(), head.hash, head.signature),
        )
        self._appended = head
        return head

    def _time_of(self, state: State, charge_id: str, run_id: str, plan_hash: str) -> str:
        """Return an entry's time, which says nothing about how long work on private data took.

        A charge has one time, whatever became of it and when. When the next one is asked for, and when a plan ends,
        follows the work before: so all of a plan carries the time that the ledger showed when it was admitted, or a
        later one that something else brought in: another plan, another key.
        """
        if state in ("COMMITTED", "ABANDONED"):
            (reserved,) = self._rows(
                "SELECT json_extract(body, '$.time') FROM entries WHERE charge_id = ? AND state = 'RESERVED'", charge_id
            )
            return str(reserved[0])
        admitted = "SELECT 1 FROM plans WHERE run_id = ? AND plan_hash = ? AND open"
        if state in ("RESERVED", "CLOSED") and self._rows(admitted, run_id, plan_hash):
            return self._last_time()
        return utc_now()

    def _last_time(self) -> str:
        rows = self._rows("SELECT json_extract(body, '$.time') FROM entries ORDER BY seq DESC LIMIT 1")
        return str(rows[0][0]) if rows else self.genesis.time

    def _not_before_last(self, time: str) -> str:
        return max(time, self._last_time())

    def _last(self) -> tuple[int, str, str]:
        """Return number, RDP total and hash of the last entry, or of the genesis."""
        rows = self._rows("SELECT seq, body, hash FROM entries ORDER BY seq DESC LIMIT 1")
        if not rows:
            return 0, "0", self.genesis.hash
        ((seq, body, entry_hash),) = rows
        return seq, json.loads(body)["rdp_total"], entry_hash

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Read. A thread that is still reading would make another's checkpoint fail: the table is locked then."""
        with self._one_thread:
            return self._db.execute(query, values).fetchall()

    def _stand(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO standing VALUES (?, ?)", (name, value))

    @contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction, durable on return, that appends to a ledger its witness agrees with.

        The witness follows before anything else happens: whoever acts on the change cannot lose it to an older copy.
        """
        with self._one_thread:
            with transaction(self._db):
                if self.current_key != public_hex(self._key):  # replaced by another process
                    raise LedgerMismatchError("signs with another key by now, so this one must not sign anything more")
                self.check_witness()
                self._check_last()
                self._appended = None
                yield
            if self._appended is not None:
                self._verified = self._appended
            self._mirror()

    def _check_last(self) -> None:
        """Check what the next entry will vouch for: what this process last saw, and what was added since.

        Raises:
            LedgerMismatchError: an entry is missing or altered, or the last one is not signed with this ledger's key.
        """
        known = self._verified
        rows = self._rows("SELECT seq, body, hash, signature FROM entries WHERE seq >= ? ORDER BY seq", known.seq)
        if known.seq:
            if not rows or rows[0][0] != known.seq:
                raise LedgerMismatchError(f"entry {known.seq} is missing, which was here: this is an older copy")
            if (rows[0][2], sha256(rows[0][1].encode())) != (known.hash, known.hash):
                raise LedgerMismatchError(f"entry {known.seq} was altered, must be as it was signed")
            rows = rows[1:]
        if not rows:
            return
        last, last_hash = known.seq, known.hash
        for last, (seq, body, entry_hash, _) in enumerate(rows, start=known.seq + 1):
            if seq != last or not follows(body, entry_hash, last_hash):
                raise LedgerMismatchError(f"entry {last} was altered, must be as it was signed")
            last_hash = entry_hash
        head = SignedHead(ledger_id=known.ledger_id, seq=last, hash=last_hash, signature=rows[-1][3])
        if not head.signed_by(public_hex(self._key)):
            raise LedgerMismatchError(f"entry {last} is not signed with the ledger's key, so nobody vouches for it")
        self._verified = head

    def _erase_log(self) -> None:
        # A secret's bytes survive in the write-ahead log until it is folded back and cut off.
        with self._one_thread:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def _mirror(self) -> None:
        # Also where nothing was appended: the head may not have reached it before a crash, or on a full disk.
        if self._witness is not None and self._witness.read() != self.head:
            self._witness.mirror(lambda: self.head)
