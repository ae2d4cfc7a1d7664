"""Copies of a ledger: one to keep elsewhere, and starting again from one.

That is after a restored backup, a lost witness or a move to another machine.

What left the node after the copy was made was paid for in entries that the copy does not have. Unless the witness, or
an export that reaches as far, proves that nothing is missing, everything that is left of the budget counts as spent.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError
from conclave.privacy.ledger.database import transaction
from conclave.privacy.ledger.derived import rebuild
from conclave.privacy.ledger.entry import INFINITE
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.mechanism_text import Restored
from conclave.privacy.ledger.reading.history import LedgerExport
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.store import Store
from conclave.privacy.ledger.witness import Witness


def copy_without_secrets(path: Path) -> bytes:
    """Return a ledger's file as bytes, as of one moment.

    The seeds of unfinished charges are left out. The ledger erases them once the output exists, because with
    the seed the noise can be removed; a copy would keep them. If such a copy is restored, these charges are
    abandoned.

    Raises:
        BadInputError: it is not a ledger, or cannot be read.
    """
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger,
            contextlib.closing(sqlite3.connect(":memory:")) as copy,
        ):
            ledger.backup(copy)
            copy.execute("PRAGMA secure_delete = ON")  # as in the ledger: what is deleted is overwritten
            copy.execute("DELETE FROM secrets")
            copy.commit()
            return copy.serialize()
    except sqlite3.Error as error:
        raise BadInputError(f"{path}: cannot be copied, must be a ledger") from error


@dataclass(frozen=True)
class Recovery:
    """How a ledger came back.

    proven: nothing is missing. Otherwise the rest of the budget was charged.
    regained: entries taken over from the export.
    charged: RDP units charged for what may be missing.
    """

    proven: bool
    regained: int
    charged: int


def recover(
    path: Path, key: Ed25519PrivateKey, *, witness: Witness, machine: str, evidence: Path | None = None
) -> Recovery:
    """Make a copied ledger usable on this machine, with one RESTORED entry.

    Args:
        key: the ledger's current key, also where only the evidence has come to it.
        witness: compared first, then made to follow the recovered ledger.
        machine: this machine's id.
        evidence: an export of the same ledger that holds entries the copy lacks.

    Raises:
        BadInputError: not a ledger, or the evidence does not hold or does not continue it.
    """
    copy = _Copy(path, key, witness=witness)
    try:
        regained = 0 if evidence is None else copy.take_over(LedgerExport(evidence))
        copy.check_own_key()
        seen = witness.read()
        proven = seen is not None and seen.seq <= copy.head.seq and copy.holds(seen)
        return Recovery(proven, regained, copy.restart(machine, proven=proven))
    finally:
        copy.close()


class _Copy(Store):
    """A ledger that is opened in order to be recovered: its place and its witness are not checked yet."""

    def _check_key(self, signed_with: str) -> None:
        pass  # the evidence may rotate it

    def _check_place(self, machine: str | None) -> None:
        pass

    def check_witness(self) -> None:
        pass

    def _catch_up(self) -> None:
        pass

    def take_over(self, export: LedgerExport) -> int:
        """Append what the export has beyond this copy's last entry; return how many entries."""
        where = export.path
        if export.genesis != self.genesis:
            raise BadInputError(f"{where}: is the export of another ledger, must be of {self.genesis.ledger_id}")
        findings = audit_history(export).findings
        if findings:
            raise BadInputError(f"{where}: does not hold ({findings[0]}), must be an unaltered export")
        last, _, last_hash = self._last()
        lines = list(export.lines())
        if len(lines) <= last:
            return 0
        if last and sha256(lines[last - 1]) != last_hash:
            raise BadInputError(f"{where}: is of another history, must continue this ledger's")
        with transaction(self._db):
            for seq, line in enumerate(lines[last:], start=last + 1):
                signature = export.head.signature if seq == export.head.seq else ""
                self._db.execute(
                    "INSERT INTO entries (seq, body, hash, signature) VALUES (?, ?, ?, ?)",
                    (seq, line.decode(), sha256(line), signature),
                )
            rebuild(self._db)
            self.check_own_key()  # or nothing is taken over
        return len(lines) - last

    def check_own_key(self) -> None:
        """Refuse a ledger, or evidence, that somebody else's key vouches for."""
        if self.current_key != public_hex(self._key):
            raise BadInputError(f"{self.path}: was signed with another key, must be recovered with its own")

    def restart(self, machine: str, *, proven: bool) -> int:
        """Append the RESTORED entry; return what it charged."""
        with self._change():
            total = self._last()[1]
            left = 0 if total == INFINITE else max(0, int(self.genesis.rdp_budget) - int(total))
            charge = 0 if proven else left
            seq = self._last()[0]
            said = Restored(machine, proven).spell()
            self._append("RESTORED", sha256(f"restored after {seq}".encode()), said, str(charge))
            self._stand("machine", machine)
            self._db.execute("UPDATE plans SET open = 0")
            # Another machine, or an unknown history: no pending work could be repeated exactly.
            self._db.execute("DELETE FROM secrets")
        self._erase_log()
        return charge
