"""A ledger and what belongs to it on disk: its signing key, the next one while keys change, and its witness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.privacy.ledger import Genesis, Ledger
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.keys import DamagedKeyError, create_key, load_key
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.upkeep.recovery import Recovery, recover
from conclave.privacy.ledger.witness import Witness


class LedgerFiles:
    """``NAME.db`` with ``NAME.key`` beside it, and a witness elsewhere."""

    def __init__(self, path: Path, witness: Path) -> None:
        self.path = path
        self.key_path = path.with_suffix(".key")
        self._next_key_path = path.with_suffix(".key.next")
        self.witness = Witness(witness)

    @property
    def genesis(self) -> Genesis:
        """The constants that the ledger was created with; a change of keys that a crash interrupted is finished first.

        Raises:
            BadInputError: there is no ledger.
        """
        self._finish_rotation()
        return LedgerFile(self.path).genesis

    def public_key(self) -> str:
        """Return the public half of the key; a key is created where there is none.

        Raises:
            BadInputError: it cannot be read.
        """
        # An interrupted attempt to create the node may have left one.
        return public_hex(load_key(self.key_path) if self.key_path.exists() else create_key(self.key_path))

    def create(self, genesis: Genesis) -> None:
        """Begin the ledger. An unused one that an interrupted attempt began with the same constants is kept.

        Raises:
            BadInputError: another ledger, or a witness of another one, exists.
        """
        if not self.path.exists():
            Ledger.create(self.path, genesis, load_key(self.key_path), witness=self.witness).close()
            return
        begun = LedgerFile(self.path)
        if begun.head.seq or replace(begun.genesis, time=genesis.time) != genesis:
            raise BadInputError(
                f"{self.path}: exists already, must be a new file, or begun with the same decisions and never used"
            )
        self.open(genesis.machine_id).close()  # the witness agrees that it is unused

    def open(self, machine: str) -> Ledger:
        """Open the ledger for work on the machine named ``machine``.

        Raises:
            BadInputError: it was restored or copied, its witness is missing or ahead, or the machine or key is another.
        """
        return Ledger(self.path, load_key(self.key_path), witness=self.witness, machine=machine)

    def rotate_key(self, machine: str) -> str:
        """Replace the signing key by a new one; return its public half. A crash leaves one of the two in use.

        Raises:
            BadInputError: see :meth:`open`.
        """
        ledger = self.open(machine)
        try:
            self._next_key_path.unlink(missing_ok=True)
            new_key = create_key(self._next_key_path)
            ledger.rotate_key(new_key)
        finally:
            ledger.close()
        self._next_key_path.replace(self.key_path)
        return public_hex(new_key)

    def restore(self, machine: str, evidence: Path | None) -> Recovery:
        """Start again from a restored or moved ledger; see :mod:`conclave.privacy.ledger.upkeep.recovery`.

        Raises:
            BadInputError: it is not a ledger of this key, or the evidence does not hold.
        """
        return recover(self.path, load_key(self.key_path), witness=self.witness, machine=machine, evidence=evidence)

    def _finish_rotation(self) -> None:
        """If a crash came between changing the ledger's key and changing the key file, finish the change."""
        if self._next_key_path.exists():
            try:
                next_key = load_key(self._next_key_path)
            except DamagedKeyError:  # the ledger only hears of a key that is whole on disk, so it signed nothing
                return
            if LedgerFile(self.path).head.signed_by(public_hex(next_key)):
                self._next_key_path.replace(self.key_path)
