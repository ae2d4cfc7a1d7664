"""Receipts: what the server can prove about every node's ledger.

A receipt is the ledger head that a node signed when it committed a release. The server keeps them all: it sends a node
the last one with the next request, so a ledger that went back in time is detected at once, and an audit compares them
with the ledgers afterwards.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, ValidationError

from conclave.base.errors import BadInputError
from conclave.base.frozen import Frozen
from conclave.base.reading import read_text
from conclave.base.whole_file import append_durably
from conclave.privacy.ledger import SignedHead
from conclave.privacy.ledger.heads import HEX_KEY
from conclave.protocol.charges import ChargeKind
from conclave.protocol.messages import LedgerIdentity

EMPTY_RECEIPT = SignedHead(ledger_id="0" * 32, seq=0, hash="0" * 64, signature="0" * 128)
"""Stands for a receipt where only the size of a message matters."""


class KeptReceipt(Frozen):
    """One line of ``receipts.jsonl``.

    node: fingerprint.
    kind: what was paid for; ``evaluate`` is of the node's ledger for held-out units.
    signing_key: the key that the node stated. output_hash: SHA-256 of the bytes that arrived.
    """

    round: int = Field(ge=1)
    node: str = Field(pattern=r"^[0-9a-f]{16}$")
    run_id: str
    plan_hash: str = Field(pattern=HEX_KEY)
    charge_id: str = Field(pattern=HEX_KEY)
    output_hash: str = Field(pattern=HEX_KEY)
    signing_key: str = Field(pattern=HEX_KEY)
    receipt: SignedHead
    kind: ChargeKind = "train"


class ReceiptBook:
    """The receipts of one run, in memory and in a file that only grows.

    A ledger is known by its fingerprint; a node's fingerprint is that of its training ledger.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what was kept before.

        Args:
            path: the file; None keeps receipts in memory only.

        Raises:
            BadInputError: a line of the file is damaged.
        """
        self._path = path
        self._heads: dict[str, dict[int, SignedHead]] = defaultdict(dict)
        self._seqs: dict[tuple[str, str], int] = {}  # (ledger, charge id) → seq of its receipt
        self._charges: dict[tuple[str, int], str] = {}  # and back
        self._known: set[KeptReceipt] = set()
        self._new: list[KeptReceipt] = []
        if path is not None and path.is_file():
            for kept in read_receipts(path, forgive_last=True):
                self._remember(kept)
            self._cut_torn_line(path)

    def latest(self, ledger: str) -> SignedHead | None:
        """Return the latest head of a ledger that was sent."""
        heads = self._heads.get(ledger)
        return heads[max(heads)] if heads else None

    def why_refused(self, ledger: LedgerIdentity, receipt: SignedHead) -> str | None:
        """Say what is wrong with a receipt that came with a reply; None if it continues what is known."""
        if receipt.ledger_id != ledger.ledger_id:
            return "it is of another ledger"
        heads = self._heads.get(ledger.fingerprint, {})
        if receipt.seq in heads:
            return None if heads[receipt.seq].hash == receipt.hash else "it contradicts an earlier one"
        if heads and receipt.seq < max(heads):
            return "it is older than one that was sent before"
        return None if receipt.signed_by(ledger.signing_key) else "it is not signed with the node's key"

    def has_charge(self, ledger: str, charge_id: str) -> bool:
        """Say whether a receipt of this ledger for this charge was sent."""
        return (ledger, charge_id) in self._seqs

    def is_new_or_same(self, ledger: str, charge_id: str, receipt: SignedHead) -> bool:
        """Say whether charge and receipt are both unknown, or were sent together before: a stored reply again."""
        seq, charge = self._seqs.get((ledger, charge_id)), self._charges.get((ledger, receipt.seq))
        return seq in (None, receipt.seq) and charge in (None, charge_id)

    def keep(self, kept: KeptReceipt) -> None:
        """Keep a receipt that passed; :meth:`save` makes it durable."""
        if kept not in self._known:
            self._remember(kept)
            self._new.append(kept)

    def save(self) -> None:
        """Write what was kept since the last call to the file, durably."""
        if self._path is not None and self._new:
            append_durably(self._path, "".join(kept.model_dump_json() + "\n" for kept in self._new).encode())
        self._new = []

    def _remember(self, kept: KeptReceipt) -> None:
        self._known.add(kept)
        ledger = fingerprint_of(kept.receipt)
        self._heads[ledger][kept.receipt.seq] = kept.receipt
        self._seqs[ledger, kept.charge_id] = kept.receipt.seq
        self._charges[ledger, kept.receipt.seq] = kept.charge_id

    @staticmethod
    def _cut_torn_line(path: Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def fingerprint_of(receipt: SignedHead) -> str:
    """Return the fingerprint of the ledger that a receipt is of."""
    return receipt.ledger_id[:16]


def read_receipts(path: Path, *, forgive_last: bool = False) -> Iterable[KeptReceipt]:
    """Yield the receipts of a run.

    Args:
        forgive_last: skip a last line that a crash cut short.

    Raises:
        BadInputError: the file cannot be read, or a line is not a receipt.
    """
    text = read_text(path, "a run's receipts, one a line")
    lines = text.split("\n")
    if forgive_last:
        lines.pop()  # what comes after the last line feed: nothing, or a line that was cut short
    while lines and not lines[-1]:
        lines.pop()  # an editor may leave empty lines at the end
    for number, line in enumerate(lines, start=1):
        try:
            yield KeptReceipt.model_validate_json(line)
        except ValidationError as error:
            cut = number == len(lines) and not text.endswith("\n")
            raise BadInputError(
                f"{path}: line {number} is {'cut short' if cut else 'damaged'}, must be a receipt"
            ) from error
